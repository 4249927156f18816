"""The search space of TraceNAS: which attention and feed-forward blocks a decoder has, and how wide they are.

An architecture is a tuple of integers, the units that each block keeps: heads, or steps of FFN channels; 0 means that
the whole block is gone. Where query heads share keys and values, a unit is one head of every group, and keys and values
stay whole. Which units stay is settled beforehand: those of highest Wanda score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zoo.engines.evolution import Dice
from zoo.engines.surgery import Block
from zoo.models.anatomy import Decoder, DecoderLayer

CHANNELS = 32
"""FFN channels of a unit; an eighth of them in a block that is narrower than eight such units."""
SWEEPS = 15
"""Passes over all blocks in which an architecture is brought to the budget."""
TOLERANCE = 0.001
"""Fraction of the weights that the budget may be missed by, if single units are smaller than that."""
LATER = 0.15
"""By how much the importance of the last layer is raised, and of those before it in proportion."""
Architecture = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One block that can be narrowed or left out.

    Attributes:
        block: which one it is.
        ranks: ``[groups, width]``, the place of each head or channel among those of its group, 0 for the best one.
        step: of the width, in one unit.
        cost: weights of one step of the width, in all groups.
        fixed: weights that leave with the whole block only.
        importance: mean Wanda score, raised in later layers.
    """

    block: Block
    ranks: torch.Tensor
    step: int
    cost: int
    fixed: int
    importance: float

    @property
    def units(self) -> int:
        """Units of the whole block."""
        return -(-self.ranks.shape[1] // self.step)

    def weights(self, kept: int) -> int:
        """Weights of the block with ``kept`` units."""
        return self.fixed + self.cost * min(kept * self.step, self.ranks.shape[1]) if kept else 0

    def mask(self, kept: int) -> torch.Tensor:
        """Heads or channels that stay, in their order in the model."""
        return (self.ranks < kept * self.step).flatten()


def parts_of(decoder: Decoder, seen: Sequence[Mapping[str, Any]]) -> list[Part]:
    """All blocks of ``decoder``.

    Args:
        decoder: dense.
        seen: for each layer, observers ``SquareSum`` of the inputs of ``output`` and ``down``.
    """
    parts = []
    for index, (layer, observers) in enumerate(zip(decoder.layers, seen, strict=True)):
        raised = 1 + LATER * index / len(decoder.layers)
        if "output" in observers:
            parts.append(_attention(index, layer, observers["output"].mean, raised))
        if "down" in observers:
            parts.append(_mlp(index, layer, observers["down"].mean, raised))
    return parts


def _wanda(weight: torch.Tensor, square_sum: torch.Tensor) -> torch.Tensor:
    """``sum over outputs of |W| |x|``, for every input: ``[in]`` float32 on the CPU."""
    return (weight.detach().float().abs().sum(0) * square_sum.to(weight.device).sqrt()).cpu()


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _attention(index: int, layer: DecoderLayer, square_sum: torch.Tensor, raised: float) -> Part:
    attention = layer.attention
    weight = attention.output.weight
    columns = _wanda(weight, square_sum)
    heads = columns.view(attention.kv_heads, attention.group, attention.head_dim).sum(-1)
    shared = attention.key.weight.numel() + attention.value.weight.numel()
    own = attention.query.weight.numel() + weight.numel()
    grouped = attention.group > 1
    return Part(
        Block(index, "attention"),
        _ranks(heads if grouped else heads.T),
        step=1,
        cost=own // attention.group if grouped else (own + shared) // attention.heads,
        fixed=shared if grouped else 0,
        importance=raised * float(columns.mean()) / weight.shape[0],
    )


def _mlp(index: int, layer: DecoderLayer, square_sum: torch.Tensor, raised: float) -> Part:
    mlp = layer.mlp
    weight = mlp.down.weight
    columns = _wanda(weight, square_sum)
    return Part(
        Block(index, "mlp"),
        _ranks(columns[None]),
        step=min(CHANNELS, max(1, mlp.width // 8)),
        cost=sum(part.weight.numel() for part in (*mlp.inputs, mlp.down)) // mlp.width,
        fixed=0,
        importance=raised * float(columns.mean()) / weight.shape[0],
    )


@dataclass(frozen=True)
class Space:
    """Architectures of one size.

    Attributes:
        parts: all blocks, in running order.
        budget: weights that an architecture may have.
        width: fraction of its units that a block keeps at least, if it stays.
        depth: fraction of the attention blocks, and of the feed-forward blocks, that stay at least.
        mutation: probability that a block of a descendant changes.
        strength: standard deviation of a relative change of width.
    """

    parts: Sequence[Part]
    budget: float
    width: float
    depth: float
    mutation: float = 0.2
    strength: float = 0.3

    def least(self, part: Part) -> int:
        """Units that ``part`` keeps at least, if it stays."""
        return max(1, math.ceil(self.width * part.units - 1e-9))

    def fewest(self, blocks: int) -> int:
        """How many of ``blocks`` of one kind stay at least."""
        return math.ceil(self.depth * blocks - 1e-9)

    def weights(self, kept: Sequence[int]) -> int:
        """Weights of an architecture."""
        return sum(part.weights(units) for part, units in zip(self.parts, kept, strict=True))

    def deep_enough(self, kept: Sequence[int]) -> bool:
        """Whether enough attention and feed-forward blocks are left."""
        for kind in ("attention", "mlp"):
            own = [units > 0 for part, units in zip(self.parts, kept, strict=True) if part.block.part == kind]
            if sum(own) < self.fewest(len(own)):
                return False
        return True

    def snapped(self, part: Part, units: float) -> int:
        """The nearest width that ``part`` can have."""
        return min(part.units, max(self.least(part), round(units)))

    def random(self, dice: Dice) -> Architecture | None:
        """One of the first population: random widths, some blocks left out, then repaired."""
        kept = [self.snapped(part, part.units * dice.uniform(self.width, 1)) for part in self.parts]
        for kind in ("attention", "mlp"):
            places = [place for place, part in enumerate(self.parts) if part.block.part == kind]
            most = len(places) - self.fewest(len(places))
            for number in dice.sample(dice.integer(0, most), len(places)).tolist():
                kept[places[number]] = 0
        return self.repaired(kept)

    def child(
        self, first: Architecture, second: Architecture, cross: bool, dice: Dice
    ) -> Architecture | None:
        """A descendant: both parents blended if they ``cross``, else the first; then mutated and repaired.

        A block that is gone in one parent stays or goes like the bias of the blend, and comes back at full width.
        """
        kept = list(first)
        if cross:
            bias = dice.uniform(0.2, 0.8)
            for place, (part, one, other) in enumerate(zip(self.parts, first, second, strict=True)):
                if one and other:
                    kept[place] = self.snapped(part, bias * one + (1 - bias) * other)
                elif one or other:
                    kept[place] = part.units if dice.chance(bias) == bool(one) else 0
        for place, part in enumerate(self.parts):
            if kept[place] and dice.chance(self.mutation):
                relative = kept[place] * dice.normal(1, self.strength)
                steps = kept[place] + round(dice.normal(0, 1.5))
                kept[place] = self.snapped(part, relative if dice.chance(0.5) else steps)
        if dice.chance(self.mutation):
            place = dice.integer(0, len(kept) - 1)
            kept[place] = 0 if kept[place] else self.parts[place].units
        return self.repaired(kept)

    def repaired(self, kept: Sequence[int]) -> Architecture | None:
        """``kept`` brought to the budget; ``None`` where that is not possible, or the depth does not suffice.

        Units leave from the least important block upwards, or return from the most important one downwards, a few in
        each of several sweeps.
        """
        if not self.deep_enough(kept):
            return None
        widths, rising = list(kept), sorted(range(len(kept)), key=lambda place: self.parts[place].importance)
        excess = self.weights(widths) - self.budget
        for _ in range(SWEEPS):
            for place in rising if excess > 0 else reversed(rising):
                part, units = self.parts[place], widths[place]
                if units:
                    share = -(-part.units // SWEEPS)
                    wanted = round(excess / (part.cost * part.step))
                    change = min(share, max(-share, wanted))
                    widths[place] = self.snapped(part, units - change)
                    excess += part.weights(widths[place]) - part.weights(units)
        smallest = min(part.cost * part.step for part in self.parts)
        everything = sum(part.weights(part.units) for part in self.parts)
        return tuple(widths) if abs(excess) <= max(TOLERANCE * everything, smallest) else None
