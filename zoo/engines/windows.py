"""Merging square windows of alike patches."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def merge_windows(x: torch.Tensor, prefix: int, window: int, threshold: float) -> torch.Tensor:
    """Which token each token of a crop becomes when windows of alike patches are merged, ``[prefix + h * h]``.

    First the prefix, then the merged windows in descending order of similarity, then the other patches in raster
    order. The similarity of a window is the mean cosine of all pairs of its patches.

    Args:
        x: ``[prefix + h * h, D]``, patches in raster order.
        prefix: tokens in front of the patches.
        window: side of the windows; divides ``h``.
        threshold: similarity from which a window is merged.
    """
    side = math.isqrt(len(x) - prefix)
    size = window * window
    places = torch.arange(side * side, device=x.device).view(side // window, window, side // window, window)
    windows = places.transpose(1, 2).reshape(-1, size)
    patches = F.normalize(x[prefix:].float(), dim=-1)[windows]
    cosine = patches @ patches.transpose(1, 2)
    pairs = cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)
    similarity = pairs / (size * (size - 1))
    order = similarity.argsort(descending=True, stable=True)[: int((similarity >= threshold).sum())]
    plan = torch.full((side * side,), -1, device=x.device)
    plan[windows[order].flatten()] = torch.arange(len(order), device=x.device).repeat_interleave(size)
    alone = plan < 0
    plan[alone] = len(order) + torch.arange(int(alone.sum()), device=x.device)
    return torch.cat((torch.arange(prefix, device=x.device), prefix + plan))
