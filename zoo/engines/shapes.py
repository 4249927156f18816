"""Decoders of one shape: the numbers that all layers share, importances to choose by, and going from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

import torch

from zoo.engines.residual_width import keep_residual_channels
from zoo.engines.surgery import Block, keep_channels, keep_heads, remove_blocks
from zoo.errors import BadParameter
from zoo.models.anatomy import Decoder


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder whose layers are alike.

    Attributes:
        hidden: channels of the residual stream.
        channels: FFN channels of a layer.
        heads: query heads of a layer.
        layers: how many.
        group: query heads per key-value head.
        head_dim: channels of a head.
        projections: matrices of a feed-forward block: 3 when it is gated.
    """

    hidden: int
    channels: int
    heads: int
    layers: int
    group: int
    head_dim: int
    projections: int

    @property
    def kv_heads(self) -> int:
        """Key-value heads of a layer."""
        return self.heads // self.group

    @property
    def weights(self) -> int:
        """Weights of all linear layers, as ``Decoder.prunable_parameters``."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (attention + self.projections * self.channels)

    def with_heads(self, heads: int) -> Shape:
        """Fewer query heads: key-value heads stay, with fewer queries each; where each has one, they leave together."""
        return replace(self, heads=heads, group=1 if self.group == 1 else heads // self.kv_heads)

    def with_parts(self, **parts: int) -> Shape:
        """Some of ``hidden``, ``channels``, ``heads`` and ``layers`` replaced by smaller numbers.

        Raises:
            BadParameter: a number is too large, or query heads cannot be shared out among the key-value heads.
        """
        for name, value in parts.items():
            if value > getattr(self, name):
                raise BadParameter(
                    f"{name} can be at most {getattr(self, name)} in this model (given: {value})"
                )
        heads = parts.pop("heads", self.heads)
        if self.group > 1 and heads % self.kv_heads:
            raise BadParameter(
                f"heads must be a multiple of {self.kv_heads}, for the key-value heads stay (given: {heads})"
            )
        return replace(self.with_heads(heads), **parts)

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden size {self.hidden}, {self.channels} FFN channels, {self.heads} heads in "
            f"{self.kv_heads} KV groups"
        )


def shape_of(decoder: Decoder) -> Shape | None:
    """The shape of a decoder; ``None`` when its layers differ or lack a part."""
    shapes = {
        Shape(
            hidden=decoder.hidden_size,
            channels=layer.mlp.width,
            heads=layer.attention.heads,
            layers=len(decoder.layers),
            group=layer.attention.group,
            head_dim=layer.attention.head_dim,
            projections=len(layer.mlp.inputs) + 1,
        )
        for layer in decoder.layers
    }
    whole = all(
        layer.attention.heads and layer.mlp.width and layer.attention_shortcut is None
        for layer in decoder.layers
    )
    return shapes.pop() if len(shapes) == 1 and whole else None


def candidate_shapes(
    dense: Shape, max_hidden: float, max_width: float, max_depth: float, multiple: int
) -> list[Shape]:
    """All shapes between ``dense`` and the smallest that may be, ``dense`` included.

    Args:
        dense: the largest.
        max_hidden: largest fraction of the residual stream that leaves.
        max_width: largest fraction of heads and of FFN channels that leaves.
        max_depth: largest fraction of layers that leaves.
        multiple: hidden sizes and numbers of channels are multiples of this, those of ``dense`` aside.
    """

    def sizes(whole: int, removable: float, step: int) -> list[int]:
        least = ceil(whole * (1 - removable) - 1e-9)
        return sorted({whole, *(size for size in range(step, whole, step) if size >= least)})

    head_step = dense.kv_heads if dense.group > 1 else 1
    return [
        replace(dense.with_heads(heads), hidden=hidden, channels=channels, layers=layers)
        for hidden, channels, heads, layers in product(
            sizes(dense.hidden, max_hidden, multiple),
            sizes(dense.channels, max_width, multiple),
            sizes(dense.heads, max_width, head_step),
            sizes(dense.layers, max_depth, 1),
        )
    ]


class FeatureNorm:
    """Size of each feature: the mean absolute value over a sequence, L2 over the sequences. ``importance [channels]``.

    An observer for ``zoo.engines.statistics``.
    """

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def update(self, *activations: torch.Tensor) -> None:
        """Add one sequence ``[tokens, channels]``."""
        (x,) = activations
        self.total = self.total.to(x.device) + x.abs().mean(0).square()

    @property
    def importance(self) -> torch.Tensor:
        """Root of the sum over sequences."""
        return self.total.sqrt()


@dataclass(frozen=True)
class Importance:
    """What to keep first: ``hidden [hidden]``, ``heads`` and ``channels`` per layer, ``layers [layers]``."""

    hidden: torch.Tensor
    heads: Sequence[torch.Tensor]
    channels: Sequence[torch.Tensor]
    layers: torch.Tensor


def rank_heads(importance: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Query heads ``[heads]``, group by group, the most important of each group first."""
    groups = importance.view(kv_heads, -1)
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(kv_heads, device=importance.device).unsqueeze(1) * groups.shape[1]
    return (within + first).flatten()


def highest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the ``count`` highest of ``importance [n]``; of equal ones the first."""
    mask = torch.zeros_like(importance, dtype=torch.bool)
    mask[importance.argsort(descending=True, stable=True)[:count]] = True
    return mask


def apply_shape(decoder: Decoder, shape: Shape, importance: Importance) -> None:
    """Cut a decoder to ``shape``, keeping what is most important of every dimension.

    Every key-value group keeps as many query heads; without groups, the most important heads of the layer stay.
    """
    for layer, heads, channels in zip(decoder.layers, importance.heads, importance.channels, strict=True):
        attention = layer.attention
        if attention.group == 1:
            mask = highest(heads, shape.heads)
        else:
            ranked = rank_heads(heads, attention.kv_heads).view(attention.kv_heads, -1)
            mask = torch.zeros_like(heads, dtype=torch.bool)
            mask[ranked[:, : shape.heads // attention.kv_heads].flatten()] = True
        keep_heads(attention, mask)
        keep_channels(layer.mlp, highest(channels, shape.channels))
    keep_residual_channels(decoder, highest(importance.hidden, shape.hidden))
    stay = highest(importance.layers, shape.layers)
    remove_blocks(decoder, [Block(index) for index, kept in enumerate(stay.tolist()) if not kept])
