"""Training of all weights of a model that is or will be pruned: distillation, sparse training, fine-tuning."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from zoo.engines.language_modelling import causal_lm_loss, collate, encode, mean_loss
from zoo.engines.training import Loss, Task, groups_by_decay
from zoo.families.recovery import MEASURED, text_tokenizer
from zoo.families.weights import AppliedPruning, WeightMethod
from zoo.interface import refuse
from zoo.models import LoadedModel
from zoo.training import Lesson, Setting, Trainable


class Retraining(WeightMethod, Trainable):
    """Mixin of weight methods that train a whole model on text."""

    @abstractmethod
    def begin(
        self, loaded: LoadedModel, setting: Setting
    ) -> tuple[LoadedModel, Callable[[], AppliedPruning]]:
        """The model that learns (which may share storage with ``loaded``), and what makes the result of it."""

    def batch_loss(self, given: LoadedModel, learning: LoadedModel, batch: dict[str, torch.Tensor]) -> Loss:
        """Loss of one batch (as from ``collate``): that of the next tokens, unless overridden.

        ``given`` is the model that the training was asked for, ``learning`` the one from ``begin``.
        """
        return causal_lm_loss(learning.model, batch)

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Make the model that learns, encode the text.

        Raises:
            BadInput: the model has no tokenizer.
            Refused: it is part of a vision-language model.
        """
        if loaded.anatomy.kind != "decoder":
            raise refuse(self, "a decoder LLM to train and save", loaded.anatomy.description)
        return self.lesson(loaded, examples, heldout, setting)

    def lesson(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """The same for any model with text.

        Raises:
            BadInput: the model has no tokenizer.
        """
        tokenizer = text_tokenizer(self, loaded)
        learning, finish = self.begin(loaded, setting)
        padding = tokenizer.pad_token_id or 0
        learnt, measured = (
            [example for text in texts for example in encode(tokenizer, text, setting.length)]
            for texts in (examples, heldout[:MEASURED])
        )

        def measure() -> dict[str, float]:
            if not measured:
                return {}
            return {"held-out perplexity": math.exp(min(700.0, mean_loss(learning.model, measured, padding)))}

        task = Task(
            groups=groups_by_decay(learning.model.named_parameters()),
            examples=learnt,
            collate=partial(collate, padding=padding, device=loaded.device),
            loss=lambda batch, _: self.batch_loss(loaded, learning, batch),
            module=learning.model,
        )
        return Lesson(task, finish, measure)
