"""Optimal brain surgery against least squares solved from scratch, and the group steps of a published pruner."""

from __future__ import annotations

import pytest
import torch

from zoo.engines.second_order import (
    SecondMoment,
    damped,
    inverse,
    inverse_factor,
    refit_columns,
    removal_costs,
    remove_columns,
    sweep_columns,
)
from zoo.errors import RunFailed


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[7, 12]`` and a Hessian of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(7, 12, generator=generator, dtype=torch.float64), inputs.T @ inputs / 50


def error(new: torch.Tensor, old: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr((W' - W) H (W' - W)^T) / 2``."""
    return float(((new - old) @ hessian * (new - old)).sum() / 2)


def best(weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Least squares of every row on the inputs in ``kept [out, in]``, one row at a time."""
    new = torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        new[row, mask] = torch.linalg.solve(hessian[mask][:, mask], (hessian @ weight[row])[mask])
    return new


def test_the_hessian_is_twice_the_mean_over_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(length, 5, generator=generator) for length in (3, 7, 4)]
    moment = SecondMoment()
    for one in sequences:
        moment.update(one)
    expected = 2 * sum(one.T @ one for one in sequences) / 3
    torch.testing.assert_close(moment.hessian, expected)


@pytest.mark.parametrize("size", [1, 3])
def test_removing_groups_is_least_squares_on_the_rest(size: int) -> None:
    weight, hessian = problem()
    left, gone = inverse(hessian), torch.zeros(12, dtype=torch.bool)
    new = weight
    for group in (2, 0):
        costs = removal_costs(new, left, size)
        before = error(new, weight, hessian)
        columns = torch.arange(group * size, (group + 1) * size)
        new, left = remove_columns(new, left, columns)
        gone[columns] = True
        kept = (~gone).expand(7, -1)
        torch.testing.assert_close(new, best(weight, hessian, kept))
        assert float(costs[group]) == pytest.approx(error(new, weight, hessian) - before)
        torch.testing.assert_close(left[~gone][:, ~gone], torch.linalg.inv(hessian[~gone][:, ~gone]))
        torch.testing.assert_close(refit_columns(hessian, weight @ hessian, ~gone), new)
    assert removal_costs(new, left, size)[[2, 0]].isinf().all()


@pytest.mark.parametrize("block", [1, 4, 5, 12, 50])
def test_a_sweep_repairs_with_the_columns_that_are_left(block: int) -> None:
    """Columns already passed stay; so a slow sweep solves least squares for the later ones, row by row."""
    weight, hessian = problem(1)
    kept = torch.rand(7, 12, generator=torch.Generator().manual_seed(2)) > 0.5
    expected = weight.clone()
    for column in range(12):
        for row in range(7):
            if not kept[row, column]:
                value, later = expected[row, column].clone(), slice(column + 1, None)
                expected[row, column] = 0
                rest = hessian[later, later]
                if len(rest):
                    expected[row, later] += torch.linalg.solve(rest, hessian[later, column] * value)
    place = 0

    def given(saliency: torch.Tensor) -> torch.Tensor:
        nonlocal place
        place += saliency.shape[1]
        return kept[:, place - saliency.shape[1] : place]

    found = sweep_columns(weight, inverse_factor(hessian), given, chosen=block, block=block)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found == 0, ~kept)


def test_saliency_is_the_error_that_a_removal_costs() -> None:
    """With one weight to remove, the sweep's ``w^2 / U_jj^2 / 2`` is the error of the best repair by later columns."""
    weight, hessian = problem(3)
    saliencies: list[torch.Tensor] = []

    def note(saliency: torch.Tensor) -> torch.Tensor:
        saliencies.append(saliency)
        return torch.ones_like(saliency, dtype=torch.bool)

    factor = inverse_factor(hessian)
    assert torch.equal(sweep_columns(weight, factor, note, chosen=12, block=12), weight)
    for column in (0, 5, 11):
        only = torch.ones(7, 12, dtype=torch.bool)
        only[:, column] = False
        columns = iter(range(12))
        repaired = sweep_columns(
            weight, factor, lambda _, only=only, columns=columns: only[:, [next(columns)]], chosen=1, block=1
        )
        row = (repaired - weight) @ hessian * (repaired - weight)
        torch.testing.assert_close(saliencies[0][:, column] / 2, row.sum(1) / 2)


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    _, hessian = problem()
    added = damped(hessian, 0.01) - hessian
    torch.testing.assert_close(added, 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64))


def test_a_singular_hessian_says_what_to_do() -> None:
    singular = torch.zeros(3, 3)
    for solve in (inverse, inverse_factor):
        with pytest.raises(RunFailed, match="raise the damping"):
            solve(singular)
