"""Graphs over the patches of an image, as adjacency matrices, and which patches attention can best do without.

Pure tensor functions, batched.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import normalize

Rule = Literal[
    "cls-mean",
    "cls-max",
    "received-mean",
    "received-max",
    "diagonal-mean",
    "diagonal-max",
    "product-mean",
    "product-max",
    "sum-max",
    "unlike-mean",
    "unlike-max",
]


def grid_neighbours(rows: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
    """The eight patches around each one of a grid, in raster order: ``[n, n]`` bool, symmetric, empty diagonal."""
    row, column = (
        axis.flatten()
        for axis in torch.meshgrid(
            torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
        )
    )
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    return near.fill_diagonal_(False)


def nearest_neighbours(x: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` most similar others of each patch by cosine (all that tie with the last one, too).

    Args:
        x: patches ``[B, n, D]``.
        count: at most ``n - 1`` are found.

    Returns:
        ``[B, n, n]`` bool, empty diagonal; row ``i`` says who is near ``i``, which is not symmetric.
    """
    feature = normalize(x.detach().float(), dim=-1)
    likeness = feature @ feature.transpose(1, 2)
    last = max(0, x.shape[1] - 1 - count)  # in rising order; a patch is most similar to itself
    if x.device.type == "cpu":  # four times faster than topk there
        lowest = torch.from_numpy(np.partition(likeness.numpy(), last)[..., last])
    else:
        lowest = likeness.kthvalue(last + 1).values
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return (likeness >= lowest.unsqueeze(-1)) & ~itself


def normalised(adjacency: torch.Tensor) -> torch.Tensor:
    """``D^-1/2 A D^-1/2`` with ``D`` the row sums, in float32; a patch without neighbours keeps an empty row.

    Args:
        adjacency: ``[..., n, n]`` bool.
    """
    graph = adjacency.float()
    root = graph.sum(-1).clamp(min=1).rsqrt()
    return root.unsqueeze(-1) * graph * root.unsqueeze(-2)


def sparsified(attention: torch.Tensor, kept: float) -> torch.Tensor:
    """Set the smallest entries of each head's map to zero; rows are not made to sum to 1 again.

    Args:
        attention: ``[B, H, N, N]``.
        kept: fraction of the ``N * N`` entries that stays; ``int(N * N * (1 - kept)) - 1`` go, ties with the next stay.
    """
    count = int(attention.shape[-1] ** 2 * (1 - kept))
    if count < 1:
        return attention
    if attention.device.type != "cpu" or attention.requires_grad:
        lowest = attention.detach().flatten(2).kthvalue(count, dim=-1).values
        return attention * (attention >= lowest[..., None, None])
    # Map by map: a threshold that is one number is several times faster than a mask.
    sparse = torch.empty_like(attention, memory_format=torch.contiguous_format)
    for full, thin in zip(attention.flatten(0, 1), sparse.flatten(0, 1), strict=True):
        below = np.nextafter(np.float32(_smallest(full, count)), np.float32(-np.inf))
        torch.threshold(full, float(below), 0.0, out=thin)
    return sparse


_EVERY = 127
"""Of so many values one is compared with all others."""


def _smallest(x: torch.Tensor, count: int) -> float:
    """The ``count``-th smallest value of ``x`` (float32, on a CPU, any shape); NaN if NaN are among its values.

    A few values, in order, are compared with all others until two neighbours have it between them; where to look next
    is interpolated, so that takes about four comparisons. Only what lies between is sorted: on a CPU this is several
    times faster than a partition of all.
    """
    values = x.detach().flatten().numpy()
    steps = np.sort(values[::_EVERY])
    low, high, below, above = -1, len(steps), 0, len(values)
    while high - low > 1:
        guess = low + round((count - below) / (above - below) * (high - low))
        place = min(max(guess, low + 1), high - 1)
        less = int(np.count_nonzero(values < steps[place]))
        if less < count:
            low, below = place, less
        else:
            high, above = place, less
    between = values >= (steps[low] if low >= 0 else -np.inf)
    if high < len(steps):
        between &= values < steps[high]
    found, rank = values.compress(between), count - 1 - below
    return float(np.partition(found, rank)[rank]) if rank < len(found) else math.nan


def standing(attention: torch.Tensor, rule: Rule, prefix: int) -> torch.Tensor:
    """How much attention needs each patch; the lowest can go.

    A patch that attends to itself is hard to make from others (``diagonal``); one that receives much attention tells
    much to others (``received``, summed over all queries, prefix included). Taken over heads as the mean or the
    highest; ``product`` and ``sum`` combine the two. ``cls``: attention of the first token. ``unlike``: patches whose
    rows of the map resemble those of all others are the lowest.

    Args:
        attention: ``[B, H, N, N]``.
        rule: see above.
        prefix: tokens in front of the patches.

    Returns:
        ``[B, N - prefix]``.
    """
    signal, _, over = rule.partition("-")

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.mean(1) if over == "mean" else x.amax(1)

    if signal == "cls":
        return heads(attention[:, :, 0, prefix:])
    if signal == "unlike":
        row = normalize(heads(attention[:, :, prefix:]), dim=-1)
        return -(row @ row.sum(1).unsqueeze(-1)).squeeze(-1)
    diagonal = heads(attention.diagonal(dim1=2, dim2=3)[..., prefix:])
    received = heads(attention.sum(2)[..., prefix:])
    return {
        "diagonal": diagonal,
        "received": received,
        "product": diagonal * received,
        "sum": diagonal + received,
    }[signal]
