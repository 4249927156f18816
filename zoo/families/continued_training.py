"""Continued training: after pruning, all weights that are left go on learning from text, as in pre-training.

``zoo train METHOD`` prunes as ``zoo run METHOD`` does, or takes a model that the method pruned and saved before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from zoo.engines.language_modelling import causal_lm_loss, collate, encode, mean_loss
from zoo.engines.training import Recipe, Task, groups_by_decay
from zoo.errors import BadInput
from zoo.families.recovery import MEASURED, pruned_model
from zoo.families.weights import AppliedPruning, WeightMethod
from zoo.interface import refuse
from zoo.models import LoadedModel
from zoo.training import Lesson, Setting, Trainable


class ContinuedTraining(WeightMethod, Trainable):
    """Mixin of weight methods whose paper trains what is left."""

    recipe: ClassVar[Recipe] = Recipe()

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Prune, encode the text, let everything learn.

        Raises:
            BadInput: the model has no tokenizer.
            Refused: another method has pruned the model, or it is part of a vision-language model.
        """
        if loaded.anatomy.kind != "decoder":
            raise refuse(self, "a decoder LLM to train and save", loaded.anatomy.description)
        tokenizer = loaded.tokenizer
        if tokenizer is None:
            raise BadInput(f"{loaded.ref} has no tokenizer, so {self.slug} cannot train it on text")
        _, applied = pruned_model(self, loaded, setting)
        model, padding = applied.model, tokenizer.pad_token_id or 0
        learnt, measured = (
            [example for text in texts for example in encode(tokenizer, text, setting.length)]
            for texts in (examples, heldout[:MEASURED])
        )

        def finish() -> AppliedPruning:
            return applied

        def measure() -> dict[str, float]:
            if not measured:
                return {}
            return {"held-out perplexity": math.exp(min(700.0, mean_loss(model, measured, padding)))}

        task = Task(
            groups=groups_by_decay(model.named_parameters()),
            examples=learnt,
            collate=partial(collate, padding=padding, device=loaded.device),
            loss=lambda batch, _: causal_lm_loss(model, batch),
            module=model,
        )
        return Lesson(task, finish, measure)
