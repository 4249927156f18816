"""Plain translations of the greedy rules: the full matrix, then a loop over slices of it.

Vectors are ``x [N, d]``, importances and qualities ``[N]``; each returns the picks in their order.
"""

from __future__ import annotations

import math

import torch


def _cosines(x: torch.Tensor) -> torch.Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.T


def max_min(x: torch.Tensor, count: int) -> list[int]:
    """DivPrune: first the row with the farthest nearest neighbour, then the one farthest from the picked rows."""
    distances = 1 - _cosines(x)
    picked = [int(distances.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picked) < count:
        picked.append(int(distances[picked].min(dim=0).values.argmax()))
    return picked


def from_first(x: torch.Tensor, count: int) -> list[int]:
    """Farthest-point sampling, which is greedy k-centre, from row 0."""
    distances = 1 - _cosines(x)
    picked = [0]
    while len(picked) < count:
        picked.append(int(distances[picked].min(dim=0).values.argmax()))
    return picked


def max_sum(x: torch.Tensor, count: int) -> list[int]:
    """The row whose cosines to the picked ones sum to the least, from row 0."""
    cosines = _cosines(x)
    picked = [0]
    while len(picked) < count:
        total = cosines[picked].sum(dim=0)
        total[picked] = math.inf
        picked.append(int(total.argmin()))
    return picked


def relevance(x: torch.Tensor, importance: torch.Tensor, count: int) -> list[int]:
    """Maximal marginal relevance, importance and novelty of equal weight."""
    cosines = _cosines(x)
    picked = [int(importance.argmax())]
    while len(picked) < count:
        score = 0.5 * importance - 0.5 * cosines[:, picked].max(dim=1).values
        score[picked] = -math.inf
        picked.append(int(score.argmax()))
    return picked


def weighted(x: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """The largest weight times distance to the nearest picked row."""
    distances = 1 - _cosines(x)
    picked = [int(weight.argmax())]
    while len(picked) < count:
        score = weight * distances[picked].min(dim=0).values
        score[picked] = -math.inf
        picked.append(int(score.argmax()))
    return picked


def determinant(x: torch.Tensor, quality: torch.Tensor, count: int) -> list[int]:
    """Greedy MAP of a DPP: the row that adds most to the log-determinant, by the Schur complement of the kernel."""
    kernel = quality[:, None] * _cosines(x) * quality
    picked = [int(kernel.diagonal().argmax())]
    while len(picked) < count:
        rows = kernel[picked]
        gain = kernel.diagonal() - (rows * torch.linalg.solve(rows[:, picked], rows)).sum(dim=0)
        gain[picked] = -math.inf
        picked.append(int(gain.argmax()))
    return picked


def coverage(x: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """Facility location: the gain in coverage of every candidate, times its weight, anew for each pick."""
    cosines = _cosines(x)
    covered = torch.zeros(len(x))
    picked: list[int] = []
    for _ in range(count):
        score = (cosines - covered).clamp(min=0).sum(dim=1) * weight
        score[picked] = -math.inf
        picked.append(int(score.argmax()))
        covered = torch.maximum(covered, cosines[picked[-1]])
    return picked
