"""Recovery: LoRA fine-tuning of a pruned model, merged into its weights afterwards.

``zoo train METHOD`` prunes the model as ``zoo run METHOD`` does, puts adapters on the linear layers of what is left,
trains them on text beside the frozen weights, and adds them to the weights. A model that the method pruned and saved
before is not pruned again. A method says how large each layer's adapters are, and may make its own examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from pydantic import Field

from zoo.data import calibration_windows, load_texts
from zoo.dialogues import Dialogue
from zoo.engines.language_modelling import TokenExample, causal_lm_loss, collate, encode, mean_loss
from zoo.engines.lora import Adapters
from zoo.engines.surgery import share_parameters
from zoo.engines.training import Group, Recipe, Task
from zoo.errors import BadInput, Refused
from zoo.families.weights import LENGTH, AppliedPruning, WeightMethod
from zoo.interface import refuse
from zoo.models import LoadedModel
from zoo.report import Report
from zoo.training import Lesson, Setting, Trainable

MEASURED = 64
"""Held-out examples that perplexity is measured on, at most."""


class LoraRecovery(WeightMethod, Trainable):
    """Mixin of weight methods whose paper heals the pruned model with LoRA."""

    recipe: ClassVar[Recipe] = Recipe()
    adapter_dropout: ClassVar[float] = 0.0
    alpha_per_rank: ClassVar[float] = 2.0

    recovery_rank: int = Field(
        8, ge=1, description="Mean rank of the adapters with which zoo train recovers the pruned model."
    )

    def adapter_ranks(self, dense: LoadedModel, pruned: LoadedModel, setting: Setting) -> list[int]:
        """Rank of the adapters in each layer of ``pruned``: the same everywhere, unless overridden."""
        return [self.recovery_rank] * len(_layers(pruned))

    def calibration_windows(self, dense: LoadedModel, setting: Setting) -> torch.Tensor:
        """The token ids ``[windows, tokens]`` that pruning is calibrated on, for a further look at the dense model."""
        texts = setting.calibration or load_texts("news", split="calibration")
        return calibration_windows(dense.tokenizer, texts, setting.windows, LENGTH, setting.seed)

    def lessons(
        self, dense: LoadedModel, dialogues: Sequence[Dialogue], setting: Setting
    ) -> list[list[TokenExample]]:
        """What is to be learnt from each dialogue: the text itself in pieces, unless overridden."""
        return [encode(dense.tokenizer, dialogue, setting.length) for dialogue in dialogues]

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Prune, put adapters on, encode the text.

        Raises:
            BadInput: the model has no tokenizer.
            Refused: another method has pruned the model, or it is part of a vision-language model.
            NeedsExtra: peft is not installed.
        """
        if loaded.anatomy.kind != "decoder":
            raise refuse(self, "a decoder LLM to train and save", loaded.anatomy.description)
        tokenizer = text_tokenizer(self, loaded)
        method, applied = pruned_model(self, loaded, setting)
        model = applied.model
        lessons = self.lessons(loaded, [*examples, *heldout[:MEASURED]], setting)
        learnt = list(chain.from_iterable(lessons[: len(examples)]))
        measured = list(chain.from_iterable(lessons[len(examples) :]))
        ranks = self.adapter_ranks(loaded, applied.loaded, setting)
        decoder = applied.loaded.anatomy.decoder
        assert decoder is not None
        adapters = Adapters(
            model,
            decoder,
            ranks,
            alpha_per_rank=self.alpha_per_rank,
            dropout=self.adapter_dropout,
            seed=setting.seed,
        )
        padding = tokenizer.pad_token_id or 0
        task = Task(
            groups=[Group(adapters.parameters)],
            examples=learnt,
            collate=partial(collate, padding=padding, device=loaded.device),
            loss=lambda batch, _: causal_lm_loss(model, batch),
            module=model,
        )

        def finish() -> AppliedPruning:
            adapters.merge()
            facts = {**applied.report.facts, "ranks of recovery adapters": ", ".join(map(str, ranks))}
            report = applied.report.model_copy(update={"facts": facts})
            return AppliedPruning(method, applied.loaded, report)

        def measure() -> dict[str, float]:
            if not measured:
                return {}
            return {"held-out perplexity": math.exp(min(700.0, mean_loss(model, measured, padding)))}

        return Lesson(task, finish, measure)


def text_tokenizer(method: WeightMethod, loaded: LoadedModel) -> Any:
    """The tokenizer of a model that ``method`` is to train on text; raises ``BadInput`` when it has none."""
    if loaded.tokenizer is None:
        raise BadInput(f"{loaded.ref} has no tokenizer, so {method.slug} cannot train it on text")
    return loaded.tokenizer


def pruned_model(
    method: WeightMethod, loaded: LoadedModel, setting: Setting
) -> tuple[WeightMethod, AppliedPruning]:
    """What training goes on from: the model pruned now, or one that this method pruned and saved before.

    Returns:
        The method that pruned it, with the parameters of that time, and the pruned model.

    Raises:
        Refused: another method has pruned the model.
    """
    record = loaded.facts.get("pruning")
    if record is None:
        return method, method.apply(
            loaded,
            calibration=setting.calibration,
            samples=setting.windows,
            seed=setting.seed,
            progress=partial(setting.progress, "pruning"),
        )
    if record.get("method") != method.slug:
        raise Refused(
            f"{method.slug} recovers what it pruned itself, and {loaded.ref} was pruned by {record.get('method')}: "
            "name a dense model, or the method that pruned this one"
        )
    model = share_parameters(loaded.model)
    copy = LoadedModel(model, loaded.processor, loaded.ref, loaded.revision, dict(loaded.facts))
    # As recorded; parameters that exclude each other are all in the record, one of them with its default.
    before = type(method).model_construct(**record["parameters"])
    return before, AppliedPruning(before, copy, Report.model_validate(record["report"]))


def _layers(loaded: LoadedModel) -> Sequence[Any]:
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    return decoder.layers
