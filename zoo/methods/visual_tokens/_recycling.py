"""Merging unimportant tokens inside the cells of a grid instead of dropping them (VFlowOpt, arXiv 2508.05211)."""

from __future__ import annotations

import torch

from zoo.engines.images import ImageView
from zoo.engines.reductions import Join


def count_low(tokens: int, share: float, cell: float) -> int:
    """Tokens that are pruned or merged: those over budget and one per cell, which takes a recycled token."""
    return min(tokens, round(tokens * (1 - share)) + int(tokens / cell**2))


def cells(image: ImageView, side: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Part of each token of a picture ``[n]``, and row and column of its cell ``[n, 2]``; newlines end their row."""
    part, place = image.part.clone(), image.coordinates[:, -2:].clone()
    for token in image.newline.nonzero().squeeze(-1).tolist():
        if token and part[token - 1] >= 0:
            part[token], place[token] = part[token - 1], place[token - 1] + place.new_tensor([0, 1])
    return part, (place.double() / side).floor().long()


def recycle(importance: torch.Tensor, part: torch.Tensor, cell: torch.Tensor, low: int) -> Join:
    """Merge the ``low`` least important tokens of each cell into the strongest of them, weighted by importance.

    Args:
        importance: ``[N]``.
        part: grid that each token stands in, ``[N]``.
        cell: row and column of its cell, ``[N, 2]``.
        low: how many tokens take part.

    Returns:
        The other tokens and the merged ones, in sequence order.
    """
    weak = importance.argsort(stable=True)[:low].sort().values
    key = torch.cat((part.unsqueeze(1), cell), dim=1)[weak]
    groups, group = key.unique(dim=0, return_inverse=True)
    strength = importance[weak]
    total = strength.new_zeros(len(groups)).index_add(0, group, strength)
    best = strength.new_full((len(groups),), -float("inf")).scatter_reduce(0, group, strength, "amax")
    # The first of equally strong ones wins.
    rank = torch.where(strength == best[group], weak, len(importance))
    winner = weak.new_full((len(groups),), len(importance)).scatter_reduce(0, group, rank, "amin")
    stays = torch.ones_like(importance, dtype=torch.bool)
    stays[weak] = False
    stays[winner] = True
    joins = weak != winner[group]
    anchor = stays.nonzero().squeeze(-1)
    weight = torch.ones_like(importance)
    weight[weak] = torch.where(total[group] == 0, 1.0, strength)  # nothing to weigh by: their mean
    return Join(
        anchor.unsqueeze(0),
        weak[joins].unsqueeze(0),
        torch.searchsorted(anchor, winner[group[joins]]).unsqueeze(0),
        len(importance),
        weight.unsqueeze(0),
    )
