"""Structured pruning at one ratio for heads and channels of a layer: the baselines differ only in the scores.

Layers are pruned from the first to the last. Whole key-value groups leave with their query heads, and a group's score
is the sum over all channels that its heads put out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator

from zoo.engines.budgets import without_lowest
from zoo.engines.statistics import Observer, Watch
from zoo.engines.surgery import keep_channels, keep_heads
from zoo.errors import BadParameter
from zoo.families.layer_budget import LayerBudget
from zoo.families.weights import Facts, Work
from zoo.models.anatomy import DecoderLayer


class UniformPruner(LayerBudget):
    """Base of methods that score the input channels of the output and down projections.

    Heads are few, so their number is rounded down; with ``sparsity`` FFN channels make up for what that leaves of the
    budget, with the published ``ratio`` they do not.
    """

    sparsity: float = Field(0.2, ge=0, lt=1, description="Fraction of decoder-layer weights to remove.")
    ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="The published pruning ratio, of heads and of channels, both rounded down; in place of sparsity.",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> UniformPruner:
        if self.ratio is not None and "sparsity" in self.model_fields_set:
            raise ValueError(
                "give sparsity (of the layer's weights) or ratio (of heads and channels), not both"
            )
        return self

    @property
    def target(self) -> float:
        """Fraction removed of every layer."""
        return self.sparsity if self.ratio is None else self.ratio

    def observer(self) -> Observer | None:
        """What to accumulate over the input of the output and down projections; ``None`` to read no text."""
        return None

    @abstractmethod
    def scores(self, weight: torch.Tensor, seen: Any) -> torch.Tensor:
        """Scores ``[in]`` of the inputs of ``weight [out, in]``, given their observer, if any."""

    def counts(self, layer: DecoderLayer, sparsity: float) -> tuple[int, int]:
        """How many key-value groups and channels leave.

        Raises:
            BadParameter: the layer would lose all of its channels.
        """
        groups, width = int(sparsity * layer.attention.kv_heads), layer.mlp.width
        if self.ratio is not None or not width:
            return groups, int(sparsity * width)
        sizes = {name: sum(part.weight.numel() for part in parts) for name, parts in layer.by_input.items()}
        channels = sizes["mlp"] + sizes["down"]
        heads = sum(sizes.values()) - channels
        removed = heads * groups // max(layer.attention.kv_heads, 1)
        count = round((sparsity * (heads + channels) - removed) * width / channels)
        if count >= width:
            raise BadParameter(
                f"{self.slug}: heads of this model leave in {layer.attention.kv_heads} groups, so a sparsity of "
                f"{sparsity:.4g} would take all channels of a layer; lower it"
            )
        return groups, count

    @torch.no_grad()
    def transform_layers(self, work: Work, sparsities: Sequence[float]) -> Facts:
        """Measure a layer, prune it, run it again, go on."""
        layers = work.decoder.layers
        counts = [self.counts(layer, share) for layer, share in zip(layers, sparsities, strict=True)]
        before = _sizes(layers)

        def observe(layer: DecoderLayer) -> dict[str, Watch]:
            observers = {name: self.observer() for name in ("output", "down") if name in layer.by_input}
            return {name: Watch(layer.by_input[name][0], one) for name, one in observers.items() if one}

        def prune(index: int, seen: Mapping[str, Any]) -> None:
            layer, (fewer_groups, fewer_channels) = layers[index], counts[index]
            attention, mlp = layer.attention, layer.mlp
            if attention.heads:
                outputs = self.scores(attention.output.weight, seen.get("output"))
                groups = without_lowest(outputs.view(attention.kv_heads, -1).sum(1), fewer_groups)
                keep_heads(attention, groups.repeat_interleave(attention.group))
            if mlp.width:
                channels = self.scores(mlp.down.weight, seen.get("down"))
                keep_channels(mlp, without_lowest(channels, fewer_channels))

        if observe(layers[0]):
            work.observe(observe, prune)
        else:
            for index in range(len(layers)):
                prune(index, {})
                work.step(index + 1, len(layers))
        return {name: before[name] - left for name, left in _sizes(layers).items()}


def _sizes(layers: Sequence[DecoderLayer]) -> dict[str, int]:
    """Units that are there now, under the names that a report has for what left."""
    return {
        "key-value groups removed": sum(layer.attention.kv_heads for layer in layers),
        "FFN channels removed": sum(layer.mlp.width for layer in layers),
    }
