"""The supernet of Týr-the-Pruner: every output and down projection at several sparsities, to be switched between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zoo.engines.second_order import SecondMoment
from zoo.engines.statistics import Progress, Watch, stream
from zoo.engines.surgery import Block, keep_channels, keep_heads, remove_blocks
from zoo.methods.weights._tyr_local import GroupPruner
from zoo.models.anatomy import Decoder, DecoderLayer, LinearPart

FIRST_STEP = 1 / 8
"""Step between two levels in the first round, as a fraction of a matrix."""
CHANNELS = 32
"""Smallest step of FFN channels, except in matrices so narrow that their first step is smaller."""
Levels = tuple[int, ...]
"""A level for each slot."""


@dataclass(frozen=True)
class Variant:
    """A pruned matrix without the columns that left, on the CPU: ``kept [groups]``, ``columns [out, in kept]``."""

    kept: torch.Tensor
    columns: torch.Tensor


@dataclass
class Slot:
    """One matrix of the model with its variants.

    Attributes:
        kind: ``output`` or ``down``. Only slots of one kind exchange groups, which cost the same in all of them.
        part: where it is.
        size: columns per group.
        cost: weights that leave the decoder with a group.
        removed: groups that are removed at level 0.
        variants: by level; level ``l`` removes ``l`` steps more than level 0.
        dense: the matrix before any pruning.
    """

    kind: str
    part: LinearPart
    size: int
    cost: int
    removed: int = 0
    variants: dict[int, Variant] = field(default_factory=dict)
    dense: nn.Parameter = field(init=False, repr=False)
    _installed: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        weight: Any = self.part.linear.weight
        self.dense = weight

    @property
    def groups(self) -> int:
        """Groups of the dense matrix."""
        return self.dense.shape[1] // self.size

    def levels(self, step: int, count: int) -> range:
        """Levels that there can be: up to ``count // 2`` steps to either side, as far as there are groups."""
        reach = count // 2
        return range(-min(self.removed // step, reach), min((self.groups - self.removed) // step, reach) + 1)

    def build(self, moment: torch.Tensor, levels: Sequence[int], step: int, updates: int) -> None:
        """Prune to all ``levels``, and install level 0."""
        pruner, self.variants = GroupPruner(self.dense.detach(), moment, self.size), {}
        for level in levels:
            kept, weight = pruner.keep(self.groups - self.removed - level * step, updates)
            columns = weight[:, kept.repeat_interleave(self.size)].to("cpu", self.dense.dtype)
            self.variants[level] = Variant(kept.cpu(), columns)
        self._installed = None
        self.install(0)

    def install(self, level: int) -> None:
        """Let the model compute with a variant."""
        if level == self._installed:
            return
        variant, like = self.variants[level], self.part.linear.weight
        weight = torch.zeros_like(like)
        columns = variant.kept.repeat_interleave(self.size).to(like.device)
        weight[:, columns] = variant.columns.to(like)
        self.part.linear.weight = nn.Parameter(weight, requires_grad=self.dense.requires_grad)
        self._installed = level

    def restore(self) -> None:
        """Let the model compute with the dense matrix again."""
        self.part.linear.weight = self.dense
        self._installed = None

    @property
    def kept(self) -> torch.Tensor:
        """Mask of the groups that the installed variant uses ``[groups]``."""
        assert self._installed is not None
        return self.variants[self._installed].kept


class Supernet:
    """All slots of a decoder.

    Args:
        decoder: dense.
        sparsity: fraction to remove of all weights that can leave with a group. Heads are few: they leave in even
            proportion, rounded, and channels make up the rest.
        whole_groups: let heads that share keys and values leave together.
    """

    def __init__(self, decoder: Decoder, sparsity: float, whole_groups: bool) -> None:
        self.decoder = decoder
        self.by_layer = [_slots_of(layer, whole_groups) for layer in decoder.layers]
        self.slots = [slot for slots in self.by_layer for slot in slots.values()]
        output, down = self.of_kind("output"), self.of_kind("down")
        groups, channels = (sum(slot.groups for slot in slots) for slots in (output, down))
        # Without any attention a decoder is none: one group stays.
        heads = min(round(sparsity * groups), groups - 1)
        spread(output, heads)
        if down:
            everything = sum(slot.groups * slot.cost for slot in self.slots)
            left = sparsity * everything - sum(slot.removed * slot.cost for slot in output)
            spread(down, min(max(0, round(left / down[0].cost)), channels))

    def of_kind(self, kind: str) -> list[Slot]:
        """The slots of one kind."""
        return [slot for slot in self.slots if slot.kind == kind]

    def step(self, kind: str, number: int) -> int:
        """Groups between two levels in round ``number`` (from 0), the same in all slots of a kind."""
        return step_of(kind, max(slot.groups for slot in self.of_kind(kind)), number)

    def build(
        self,
        windows: torch.Tensor,
        number: int,
        *,
        levels: int,
        updates: int,
        batch: int,
        device: torch.device | str | None,
        progress: Progress,
    ) -> None:
        """Prune every dense matrix to all levels of round ``number``; level 0 of each is installed afterwards.

        Args:
            windows: calibration ids ``[windows, tokens]``. A layer is measured on what those before it put out at
                their level 0.
            number: of the round, from 0.
            levels: sparsities per matrix.
            updates: passes in which the channels of a matrix leave; heads leave in one.
            batch, device, progress: see ``zoo.engines.statistics.stream``.
        """
        for slot in self.slots:
            slot.restore()
        index = {id(layer.module): i for i, layer in enumerate(self.decoder.layers)}

        def observe(layer: DecoderLayer) -> dict[str, Watch]:
            slots = self.by_layer[index[id(layer.module)]]
            return {kind: Watch(slot.part, SecondMoment()) for kind, slot in slots.items()}

        def prune(place: int, seen: Mapping[str, Any]) -> None:
            for kind, slot in self.by_layer[place].items():
                step = self.step(kind, number)
                passes = updates if kind == "down" else 1
                slot.build(seen[kind].total, slot.levels(step, levels), step, passes)

        stream(self.decoder, windows, observe, batch=batch, device=device, prune=prune, progress=progress)

    def install(self, levels: Levels) -> None:
        """Let the model compute with these variants."""
        for slot, level in zip(self.slots, levels, strict=True):
            slot.install(level)

    def settle(self, levels: Levels, number: int) -> None:
        """Install ``levels`` of round ``number``, and expect them from now on."""
        self.install(levels)
        for slot, level in zip(self.slots, levels, strict=True):
            slot.removed += level * self.step(slot.kind, number)

    def cut(self) -> None:
        """Take away what the installed variants do not use."""
        gone: list[Block] = []
        for index, (layer, slots) in enumerate(zip(self.decoder.layers, self.by_layer, strict=True)):
            if "output" in slots:
                attention = layer.attention
                groups = slots["output"].kept.view(attention.kv_heads, -1)
                heads = rectangular(groups.expand(-1, attention.group)).flatten()
                if bool(heads.any()):
                    keep_heads(attention, heads)
                else:
                    gone.append(Block(index, "attention"))
            if "down" in slots:
                if bool(slots["down"].kept.any()):
                    keep_channels(layer.mlp, slots["down"].kept)
                else:
                    gone.append(Block(index, "mlp"))
        remove_blocks(self.decoder, gone)


def _slots_of(layer: DecoderLayer, whole_groups: bool) -> dict[str, Slot]:
    """Slots of a layer by kind."""
    sizes = {name: sum(part.weight.numel() for part in parts) for name, parts in layer.by_input.items()}
    slots: dict[str, Slot] = {}
    attention, mlp = layer.attention, layer.mlp
    if attention.heads:
        groups = attention.kv_heads if whole_groups else attention.heads
        with_output = sizes["attention"] if whole_groups else attention.query.weight.numel()
        cost = (with_output + sizes["output"]) // groups
        size = attention.heads * attention.head_dim // groups
        slots["output"] = Slot("output", attention.output, size, cost)
    if mlp.width:
        slots["down"] = Slot("down", mlp.down, 1, (sizes["mlp"] + sizes["down"]) // mlp.width)
    return slots


def step_of(kind: str, groups: int, number: int) -> int:
    """Groups between two levels in round ``number`` (from 0) of a matrix with ``groups``: halved in each round."""
    first = max(1, round(groups * FIRST_STEP))
    return max(1 if kind == "output" else min(CHANNELS, first), first >> number)


def spread(slots: Sequence[Slot], total: int) -> None:
    """Let ``slots`` remove ``total`` groups together at level 0, in even proportion."""
    everything, before, seen = sum(slot.groups for slot in slots), 0, 0
    for slot in slots:
        seen += slot.groups
        after = total * seen // everything
        slot.removed, before = after - before, after


def rectangular(heads: torch.Tensor) -> torch.Tensor:
    """The smallest mask over ``heads [groups, heads per group]`` with equally many heads in all groups that stay.

    Attention can only be built so. A head that stays for that reason is one whose output counts for nothing.
    """
    most = int(heads.sum(1).max())
    # Heads that are used come first, then the others of their group.
    places = heads.long().sort(dim=1, descending=True, stable=True).indices[:, :most]
    filled = torch.zeros_like(heads, memory_format=torch.contiguous_format).scatter(1, places, True)
    return filled & heads.any(1, keepdim=True)
