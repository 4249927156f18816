"""Choosing a subset of vectors: greedy rules that several methods share.

Pure tensor functions on one sample. Distances are float32 whatever the model's type: half precision loses the order.
"""

from __future__ import annotations

import torch


def cosine_distances(x: torch.Tensor) -> torch.Tensor:
    """``1 - cos`` between the rows of ``x [N, D]``, ``[N, N]`` float32. A zero row is at distance 1 of everything."""
    x = x.float()
    norm = x.norm(dim=-1, keepdim=True)
    unit = x / norm.where(norm > 0, 1.0)
    return 1.0 - unit @ unit.T


def farthest_points(distances: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy solution of the max-min diversity problem.

    The first pick is the point whose nearest neighbour is farthest away; each next one is the point farthest from
    those already picked. Ties go to the smaller index. A running minimum makes one pick O(N).

    Args:
        distances: ``[N, N]``, symmetric.
        count: number of picks, at most ``N``.

    Returns:
        Indices in the order of picking, ``[count]``.
    """
    size = len(distances)
    neighbours = distances.clone()
    neighbours.fill_diagonal_(float("inf"))
    picked = torch.empty(count, dtype=torch.long, device=distances.device)
    if size == 1 or count == 0:
        return picked.zero_()
    nearest = neighbours.min(dim=0).values
    gap = torch.full_like(nearest, float("inf"))
    for step in range(count):
        best = (nearest if step == 0 else gap).argmax()
        picked[step] = best
        gap = torch.minimum(gap, distances[best])
        # A pick must not be picked again, not even among duplicates whose distance is 0 or less.
        gap[picked[: step + 1]] = -float("inf")
    return picked
