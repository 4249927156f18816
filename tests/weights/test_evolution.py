"""Pieces of evolutionary search: seeded draws, new candidates only, the fittest."""

from __future__ import annotations

import math

import torch

from zoo.engines.evolution import Dice, distinct, fittest


def dice(seed: int = 0) -> Dice:
    return Dice(torch.Generator().manual_seed(seed))


def test_draws_repeat_with_their_seed_and_stay_in_range() -> None:
    def draws(seed: int) -> list[float]:
        one = dice(seed)
        return [one.integer(1, 4), one.uniform(2, 3), one.normal(5, 2), one.choice([7, 8, 9])]

    assert draws(1) == draws(1) != draws(2)
    one = dice()
    numbers = [one.integer(1, 4) for _ in range(200)]
    assert set(numbers) == {1, 2, 3, 4}
    assert all(2 <= one.uniform(2, 3) < 3 for _ in range(50))
    spread = torch.tensor([one.normal(5, 2) for _ in range(2000)])
    assert abs(float(spread.mean()) - 5) < 0.2
    assert abs(float(spread.std()) - 2) < 0.2
    assert abs(sum(one.chance(0.3) for _ in range(2000)) / 2000 - 0.3) < 0.05
    assert sorted(one.sample(5, 5).tolist()) == [0, 1, 2, 3, 4]
    assert len(one.sample(9, 5)) == 5


def test_candidates_are_new_and_a_small_space_ends() -> None:
    one = dice()
    found = distinct(lambda: one.integer(0, 9), 20, taken=(3, 4))
    assert sorted(found) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert len(distinct(lambda: one.integer(0, 9), 4)) == 4
    assert distinct(lambda: None, 4) == []


def test_the_fittest_are_ordered_and_ties_keep_their_order() -> None:
    costs = {"a": 2.0, "b": math.nan, "c": 1.0, "d": 2.0, "e": math.inf}
    assert fittest(costs, costs.__getitem__, 3) == [("c", 1.0), ("a", 2.0), ("d", 2.0)]
    assert [name for name, _ in fittest(costs, costs.__getitem__, 9)][:3] == ["c", "a", "d"]
