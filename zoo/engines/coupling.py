"""Coupled dimensions: weights that can only leave together, with the channels that they share.

Whoever removes a head removes rows of the query, key and value projections and columns of the output projection; a
feed-forward channel is a row of the projections in and a column of the one out; a channel of the residual stream runs
through the whole model. A ``Group`` names the tensors of one such dimension, so that a method can score channels by all
they consist of. (DepGraph finds groups by tracing a network; here they are read off the anatomy.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from zoo.models.anatomy import Attention, Decoder, LinearPart, Mlp

Reduction = Literal["sum", "mean", "max", "prod", "first"]
Kind = Literal["attention", "mlp", "residual"]


@dataclass(frozen=True)
class Member:
    """A tensor of a group.

    Attributes:
        part: a linear (or its rows in a fused one), or an embedding or norm; what has a ``weight``.
        dim: the dimension of ``weight [out, in]`` that holds the group's channels; 0 for vectors.
        copies: how often it holds every channel: a key-value head serves this many consecutive query heads.
        head_dim: channels that are repeated together.
    """

    part: LinearPart | nn.Module
    dim: int
    copies: int = 1
    head_dim: int = 1

    @property
    def weight(self) -> torch.Tensor:
        """The tensor, as it is now."""
        weight = self.part.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def per_channel(self, entries: torch.Tensor) -> torch.Tensor:
        """Sum ``entries``, shaped as ``weight``, over all but the group's channels: ``[channels]``."""
        return self.fold(entries if entries.dim() == 1 else entries.sum(1 - self.dim))

    def fold(self, values: torch.Tensor) -> torch.Tensor:
        """From a value per row or column to one per channel: those of all copies are added."""
        if self.copies == 1:
            return values
        return values.view(-1, self.copies, self.head_dim).sum(1).flatten()


@dataclass(frozen=True)
class Group:
    """One coupled dimension: its tensors, and how many neighbouring channels leave together (those of a head)."""

    kind: Kind
    layer: int
    members: tuple[Member, ...]
    block: int = 1

    @property
    def channels(self) -> int:
        """Size of the dimension."""
        first = self.members[0]
        return first.weight.shape[first.dim] // first.copies

    @property
    def units(self) -> int:
        """What can leave one by one."""
        return self.channels // self.block

    @property
    def unit_weights(self) -> int:
        """Weights that leave with one unit."""
        return sum(member.weight.numel() for member in self.members) // self.units

    def scores(self, measure: Callable[[Member], torch.Tensor], reduction: Reduction) -> torch.Tensor:
        """Reduce what ``measure`` finds of the members, ``[channels]`` each, to one score per channel."""
        return reduce_members(torch.stack([measure(member).float() for member in self.members]), reduction)


def reduce_members(values: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """From ``values [members, channels]`` to ``[channels]``."""
    match reduction:
        case "sum":
            return values.sum(0)
        case "mean":
            return values.mean(0)
        case "max":
            return values.amax(0)
        case "prod":
            return values.prod(0)
        case "first":
            return values[0]


def attention_group(attention: Attention, layer: int) -> Group:
    """Key-value heads with their query heads; channels are those of the keys."""
    shared = (attention.group, attention.head_dim)
    members = (
        Member(attention.key, 0),
        Member(attention.query, 0, *shared),
        Member(attention.value, 0),
        Member(attention.output, 1, *shared),
    )
    return Group("attention", layer, members, attention.head_dim)


def mlp_group(mlp: Mlp, layer: int) -> Group:
    """Feed-forward channels."""
    return Group("mlp", layer, (*(Member(part, 0) for part in mlp.inputs), Member(mlp.down, 1)))


def residual_group(decoder: Decoder) -> Group:
    """Channels of the residual stream: embedding, norms, everything that reads or writes it, and the head."""
    members = [Member(decoder.embed, 1)]
    for layer in decoder.layers:
        norms = (layer.input_norm, layer.attention_norm, layer.post_norm, layer.mlp_norm)
        members += [Member(norm, 0) for norm in norms if norm is not None]
        for name, parts in layer.by_input.items():
            members += [Member(part, 1 if name in ("attention", "mlp") else 0) for part in parts]
    members.append(Member(decoder.norm, 0))
    if decoder.head is not None and decoder.head.weight is not decoder.embed.weight:
        members.append(Member(decoder.head, 1))
    return Group("residual", -1, tuple(members))


def layer_groups(decoder: Decoder, layers: Sequence[int] | None = None) -> list[Group]:
    """Attention and feed-forward groups of some layers (all by default), in order; without parts that were removed."""
    groups = []
    for index in range(len(decoder.layers)) if layers is None else layers:
        layer = decoder.layers[index]
        if layer.attention.heads:
            groups.append(attention_group(layer.attention, index))
        if layer.mlp.width:
            groups.append(mlp_group(layer.mlp, index))
    return groups
