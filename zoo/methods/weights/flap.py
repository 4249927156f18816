"""FLAP: remove the heads and channels whose activations fluctuate least, and put their mean in a bias.

An, Zhao, Yu, Tang, Wang: Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024
(arXiv 2312.11983). What hardly varies over calibration text can be replaced by a constant. Fluctuations, weighted by
the outgoing weights, are standardised per layer and ranked over the whole model under one parameter budget.

The recurrences and rounding follow the authors' code. With grouped queries, whole key-value groups leave: a group
scores the mean of its query heads and costs what its query, key, value and output weights take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.budgets import above_lowest, cost_threshold, keep_one, standardise, without_lowest
from zoo.engines.scores import mean_contribution, weight_times_norm, weighted_fluctuation
from zoo.engines.statistics import SquareSum, Watch
from zoo.engines.surgery import LayerCut, channels_of
from zoo.families.weights import WeightPruner
from zoo.interface import register
from zoo.models.anatomy import Decoder, DecoderLayer

Metric = Literal["IFV", "WIFV", "WIFN"]
Structure = Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"]


class Fluctuation:
    """Running mean of the activations, and how much they vary around it, both ``[channels]``.

    A sequence ``n`` (from 0) of activations ``x`` updates ``mean <- mean n/(n+1) + mean_t(x)/(n+1)`` and, from the
    second one on, ``value <- value (n-1)/n + sum_t (x - mean)^2 / (n+1)`` with the mean just updated. It is a sum over
    tokens, proportional to a variance rather than equal to one; standardisation removes the scale.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.mean = torch.zeros(())
        self.value = torch.zeros(())

    def update(self, *activations: torch.Tensor) -> None:
        """Take in one sequence ``[tokens, channels]``."""
        (x,) = activations
        n = self.sequences
        self.mean = self.mean.to(x.device) * (n / (n + 1)) + x.mean(0) / (n + 1)
        if n == 0:
            self.value = torch.zeros_like(self.mean)
        else:
            self.value = self.value * ((n - 1) / n) + (x - self.mean).square().sum(0) / (n + 1)
        self.sequences += 1


@register("flap")
class Flap(WeightPruner):
    """Fluctuation-based adaptive structured pruning. ``sparsity`` is the paper's pruning ratio as it stands."""

    least_sequences: ClassVar[int] = 2

    metric: Metric = Field(
        "WIFV", description="Fluctuation (IFV), times weights (WIFV), or Wanda's norm (WIFN)."
    )
    structure: Structure = Field(
        "AL-AM",
        description="Layers and modules alike uniform (UL-UM), heads given and uniform (UL-MM), "
        "heads given and ranked over layers (AL-MM), or all ranked together (AL-AM).",
    )
    remove_heads: int = Field(
        8, ge=0, description="Query heads to remove in the whole model (UL-MM, AL-MM only)."
    )

    def observe(self, layer: DecoderLayer) -> dict[str, Watch]:
        """The inputs of the output and down projections."""
        points = {"attention": layer.attention.output, "mlp": layer.mlp.down}
        watches = {name: Watch(point, Fluctuation()) for name, point in points.items()}
        if self.metric == "WIFN":
            watches |= {f"{name} squares": Watch(point, SquareSum()) for name, point in points.items()}
        return watches

    def channel_scores(self, seen: Mapping[str, Any], part: str, weight: torch.Tensor) -> torch.Tensor:
        """The metric of every input channel of ``weight [out, channels]``; squared for attention, as in the code."""
        if self.metric == "WIFN":
            scores = weight_times_norm(weight, seen[f"{part} squares"].mean)
        elif self.metric == "WIFV":
            scores = weighted_fluctuation(weight, seen[part].value)
        else:
            scores = seen[part].value.to(weight.device)
        return scores.square() if part == "attention" else scores

    def scores(
        self, decoder: Decoder, seen: Sequence[Mapping[str, Any]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per layer, scores of heads ``[heads]`` and of channels ``[channels]``, as the structure compares them.

        Adaptive structures standardise each layer and average over a head's channels; uniform ones add them up.
        """
        heads, channels = [], []
        for layer, statistics in zip(decoder.layers, seen, strict=True):
            attention = self.channel_scores(statistics, "attention", layer.attention.output.weight).cpu()
            mlp = self.channel_scores(statistics, "mlp", layer.mlp.down.weight).cpu()
            if self.structure.startswith("UL"):
                heads.append(attention.view(-1, layer.attention.head_dim).sum(1))
                channels.append(mlp)
            else:
                heads.append(standardise(attention).view(-1, layer.attention.head_dim).mean(1))
                channels.append(standardise(mlp))
        return heads, channels

    def masks(
        self, decoder: Decoder, groups: list[torch.Tensor], channels: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Which groups and channels of each layer stay, given their scores."""
        layers, ratio = decoder.layers, self.sparsity
        # Weights of a key-value group with its query heads, and of a channel, in units of the hidden size.
        sizes = [(2 * x.attention.group + 2) * x.attention.head_dim for x in layers]
        channel = len(layers[0].mlp.inputs) + 1
        if self.structure == "AL-AM":
            threshold = self.threshold(decoder, groups, channels)
            return [score > threshold for score in groups], [score > threshold for score in channels]
        if self.structure == "UL-UM":
            return (
                [without_lowest(score, int(ratio * score.numel())) for score in groups],
                [without_lowest(score, int(ratio * score.numel())) for score in channels],
            )
        # What heads do not cover of the budget, channels do. The order of the factors decides how int() rounds.
        per_layer = decoder.prunable_parameters() / len(layers) / decoder.hidden_size
        if self.structure == "UL-MM":
            fewer = self.remove_heads // len(layers) // layers[0].attention.group
            counts = [int((ratio * per_layer - size * fewer) / channel) for size in sizes]
            return (
                [without_lowest(score, fewer) for score in groups],
                [without_lowest(score, count) for score, count in zip(channels, counts, strict=True)],
            )
        fewer = self.remove_heads // layers[0].attention.group
        count = int((len(layers) * ratio * per_layer - sizes[0] * fewer) / channel)
        return _split(above_lowest(torch.cat(groups), fewer), groups), _split(
            above_lowest(torch.cat(channels), count), channels
        )

    def threshold(
        self, decoder: Decoder, groups: list[torch.Tensor], channels: list[torch.Tensor]
    ) -> torch.Tensor:
        """AL-AM: the score that meets the budget, with a channel as the unit of cost (rounded down, as in the code)."""
        costs = [
            torch.full(score.shape, (2 * x.group + 2) * x.head_dim // (len(layer.mlp.inputs) + 1))
            for layer, score in zip(decoder.layers, groups, strict=True)
            for x in (layer.attention,)
        ] + [torch.ones(score.shape, dtype=torch.int64) for score in channels]
        return cost_threshold(torch.cat(groups + channels), torch.cat(costs), self.sparsity)

    def decide(self, decoder: Decoder, seen: Sequence[Mapping[str, Any]]) -> list[LayerCut]:
        """Masks, and the mean contribution of all that leaves as biases."""
        heads, channels = self.scores(decoder, seen)
        groups = [
            score.view(layer.attention.kv_heads, -1).mean(1)
            for layer, score in zip(decoder.layers, heads, strict=True)
        ]
        cuts = []
        masks = zip(*self.masks(decoder, groups, channels), strict=True)
        for index, (layer, (kept_groups, kept_channels)) in enumerate(
            zip(decoder.layers, masks, strict=True)
        ):
            attention, means = layer.attention, seen[index]
            kept_heads = keep_one(kept_groups, groups[index]).repeat_interleave(attention.group)
            kept_channels = keep_one(kept_channels, channels[index])
            kept = channels_of(kept_heads, attention.head_dim)
            output_bias = mean_contribution(attention.output.weight, means["attention"].mean, kept)
            down_bias = mean_contribution(layer.mlp.down.weight, means["mlp"].mean, kept_channels)
            cuts.append(LayerCut(kept_heads, kept_channels, output_bias, down_bias))
        return cuts

    def facts(self, decoder: Decoder, cuts: Sequence[LayerCut]) -> dict[str, float | int | str]:
        """The paper's knob is the fraction of decoder weights, as ours."""
        return {"paper's pruning ratio": self.sparsity}


def _split(mask: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(mask.split([part.numel() for part in like]))
