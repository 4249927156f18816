"""Evolutionary search: random changes that depend on nothing but a seed, candidates that are new, and the best of them.

A candidate is anything that can be hashed, usually a tuple of integers. Costs are compared lowest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TypeVar

import torch

Candidate = TypeVar("Candidate", bound=Hashable)
Item = TypeVar("Item")


class Dice:
    """Random draws as Python numbers, from a generator of torch on the CPU."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def integer(self, low: int, high: int) -> int:
        """Uniform in ``low .. high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def uniform(self, low: float, high: float) -> float:
        """Uniform in ``[low, high)``."""
        return low + (high - low) * float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def normal(self, mean: float, deviation: float) -> float:
        """From a normal distribution."""
        return mean + deviation * float(torch.randn((), generator=self._generator, dtype=torch.float64))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform(0, 1) < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of ``items``, all equally likely."""
        return items[self.integer(0, len(items) - 1)]

    def sample(self, count: int, total: int) -> torch.Tensor:
        """``count`` different numbers of ``0 .. total - 1``, in random order ``[count]``."""
        return torch.randperm(total, generator=self._generator)[:count]


def distinct(
    draw: Callable[[], Candidate | None], count: int, taken: Collection[Candidate] = (), tries: int = 20
) -> list[Candidate]:
    """Up to ``count`` candidates that differ from each other and from those that are ``taken``.

    A small search space runs out of them, so there are at most ``tries`` draws for each that is wanted, and fewer
    candidates, or none, may come back.

    Args:
        draw: a candidate, or ``None`` for one that is not allowed.
        count: how many are wanted.
        taken: those that are known already.
        tries: draws per candidate wanted.
    """
    known, found = set(taken), list[Candidate]()
    for _ in range(count * tries):
        if len(found) == count:
            break
        candidate = draw()
        if candidate is not None and candidate not in known:
            known.add(candidate)
            found.append(candidate)
    return found


def fittest(
    candidates: Iterable[Candidate], cost: Callable[[Candidate], float], count: int
) -> list[tuple[Candidate, float]]:
    """The ``count`` candidates of lowest cost with their costs, lowest first; of equal ones those given first.

    A cost that is NaN is the highest.
    """
    costs = [(candidate, cost(candidate)) for candidate in candidates]
    return sorted(costs, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])[:count]
