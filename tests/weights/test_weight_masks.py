"""Masks of single weights against loops."""

from __future__ import annotations

import pytest
import torch

from zoo.engines.budgets import round_keeping_sum
from zoo.engines.weight_masks import highest_in_groups, highest_in_matrix, highest_in_rows


def scores(rows: int = 5, columns: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_rows_lose_the_same_number(sparsity: float) -> None:
    given = scores()
    kept = highest_in_rows(given, sparsity)
    for row, mask in zip(given, kept, strict=True):
        gone = sorted(range(12), key=lambda place: float(row[place]))[: int(12 * sparsity)]
        assert {place for place in range(12) if not mask[place]} == set(gone)


def test_of_equal_scores_the_left_ones_go() -> None:
    assert highest_in_rows(torch.ones(1, 6), 0.5).tolist() == [[False, False, False, True, True, True]]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.95])
def test_the_matrix_loses_one_more_than_the_index(sparsity: float) -> None:
    given = scores()
    kept = highest_in_matrix(given, sparsity)
    assert int((~kept).sum()) == (int(60 * sparsity) + 1 if sparsity else 0)
    if sparsity:
        assert given[kept].min() > given[~kept].max()


@pytest.mark.parametrize("group", [(2, 4), (4, 8), (1, 4), (3, 4), (4, 4)])
@pytest.mark.parametrize("columns", [16, 13, 17, 18])
def test_groups_keep_their_highest(group: tuple[int, int], columns: int) -> None:
    given = scores(columns=columns)
    kept = highest_in_groups(given, group)
    for start in range(0, columns, group[1]):
        part, mask = given[:, start : start + group[1]], kept[:, start : start + group[1]]
        fewer = min(group[1] - group[0], part.shape[1])
        assert ((~mask).sum(1) == fewer).all()
        for row, row_mask in zip(part, mask, strict=True):
            if fewer and fewer < len(row):
                assert row[row_mask].min() > row[~row_mask].max()


def test_rounding_keeps_the_sum() -> None:
    values = torch.tensor([1.6, 2.7, 0.2, 3.0, 1.5])
    assert round_keeping_sum(values).tolist() == [2.0, 3.0, 0.0, 3.0, 1.0]
    assert round_keeping_sum(torch.tensor([4.0, 4.0])).tolist() == [4.0, 4.0]
    for seed in range(20):
        given = 8 * torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rounded = round_keeping_sum(given)
        assert float(rounded.sum()) == round(float(given.sum()))
        assert ((rounded - given).abs() < 1).all()
