"""GAPrune's pure functions: how far two gradients agree around a weight, and which weights are the lowest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def alignment(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Local agreement of two gradients of one matrix, of their shape ``[out, in]``.

    Products of the entries of the two unit vectors, averaged over 3 x 3 neighbours (zeros beyond the edge). A matrix
    with a side of two has its cosine everywhere, one with a side of one the products themselves.
    """
    norms = first.norm(), second.norm()
    if min(map(float, norms)) <= 1e-8:
        return torch.zeros_like(first)
    products = first / (norms[0] + 1e-8) * (second / (norms[1] + 1e-8))
    width = min(3, *first.shape)
    if width == 2:
        return products.sum().expand_as(products)
    return functional.avg_pool2d(products[None, None], width, stride=1, padding=width // 2)[0, 0]


def without_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask without exactly ``count`` of ``scores [n]``, the lowest."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[scores.topk(count, largest=False, sorted=False).indices] = False
    return mask


def shared_out(sizes: Sequence[int], count: int) -> list[int]:
    """``count`` shared among matrices of these sizes in proportion; each loses 5 to 95% of its weights.

    What bounds and rounding leave over goes to the largest matrices.
    """
    total = sum(sizes)
    bounds = [(int(0.05 * size), int(0.95 * size)) for size in sizes]
    shares = [
        min(max(count * size // total, low), high) for size, (low, high) in zip(sizes, bounds, strict=True)
    ]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        low, high = bounds[index]
        shares[index] = min(max(shares[index] + count - sum(shares), low), high)
    return shares
