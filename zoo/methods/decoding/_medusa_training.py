"""How Medusa's heads learn (2401.10774, section 2.2): beside a frozen model, or together with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zoo.engines.draft_heads import HeadText, TrainedHeads, final_hidden, output_of
from zoo.engines.language_modelling import IGNORED
from zoo.engines.lora import Adapters
from zoo.engines.surgery import share_parameters
from zoo.engines.training import Group, Loss, Task
from zoo.methods.decoding._medusa_heads import MedusaHeads, accuracies, heads_loss
from zoo.models import LoadedModel
from zoo.training import Lesson


def frozen_lesson(loaded: LoadedModel, heads: MedusaHeads, text: HeadText, decay: float) -> Lesson:
    """Medusa-1: the model stays as it is, and so does its output under greedy decoding."""
    model, output = loaded.model, output_of(loaded.model)

    def loss(batch: dict[str, torch.Tensor], step: int) -> Loss:
        return heads_loss(heads, final_hidden(model, batch), batch["labels"], output, decay)

    groups = [Group(dict(heads.named_parameters()))]
    task = Task(groups, text.learnt, text.collate, loss, heads)
    measure = partial(_measure, heads, model, text)
    return Lesson(task, partial(_finish, loaded, heads, measure), partial(_by_name, measure))


def joint_lesson(
    loaded: LoadedModel,
    heads: MedusaHeads,
    text: HeadText,
    *,
    decay: float,
    heads_weight: float,
    rank: int,
    seed: int,
) -> Lesson:
    """Medusa-2: the model learns with the heads, through adapters that are merged afterwards.

    The loss is that of the language model plus ``heads_weight`` times that of the heads; the heads learn four times
    as fast as the model, which has half the recipe's rate (5e-4 in the paper).
    """
    copy = LoadedModel(
        share_parameters(loaded.model), loaded.processor, loaded.ref, loaded.revision, dict(loaded.facts)
    )
    model, decoder = copy.model, copy.anatomy.decoder
    assert decoder is not None
    adapters = Adapters(model, decoder, [rank] * len(decoder.layers), seed=seed)
    output = output_of(model)

    def loss(batch: dict[str, torch.Tensor], step: int) -> Loss:
        seen = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=True,
        )
        labels = batch["labels"]
        ahead = heads_loss(heads, seen.hidden_states[-1].float(), labels, output, decay)
        predicted = labels[:, 1:] != IGNORED
        following = functional.cross_entropy(
            seen.logits[:, :-1][predicted].float(), labels[:, 1:][predicted], reduction="sum"
        )
        total = following + heads_weight * ahead.total
        return Loss(total, int(predicted.sum()), {"language model": following, **ahead.parts})

    groups = [Group(dict(heads.named_parameters()), rate=2.0), Group(adapters.parameters, rate=0.5)]
    task = Task(groups, text.learnt, text.collate, loss, nn.ModuleList([model, heads]))
    measure = partial(_measure, heads, model, text)

    def finish() -> TrainedHeads:
        adapters.merge()
        return _finish(loaded, heads, measure, copy)

    return Lesson(task, finish, partial(_by_name, measure))


def _measure(heads: MedusaHeads, model: Any, text: HeadText) -> list[list[float]]:
    """Accuracy ``[heads][ranks]`` on held-out text."""

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in text.batches():
            yield final_hidden(model, batch), batch["labels"]

    return accuracies(heads, batches(), output_of(model))


def _by_name(measure: Callable[[], list[list[float]]]) -> dict[str, float]:
    return {f"held-out accuracy of head {head}": row[0] for head, row in enumerate(measure(), start=1)}


def _finish(
    loaded: LoadedModel,
    heads: MedusaHeads,
    measure: Callable[[], list[list[float]]],
    backbone: LoadedModel | None = None,
) -> TrainedHeads:
    heads.eval()
    heads.facts = {"model": loaded.ref, "revision": loaded.revision, "accuracies": measure()}
    return TrainedHeads(heads, backbone)
