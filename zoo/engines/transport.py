"""Moving the content of tokens into others by entropic optimal transport (Cuturi, arXiv 1306.0895).

All results are weights of the given tokens, so whatever belongs to a token can be moved along. Costs are turned into
kernels in float32: half precision underflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import normalize, one_hot

_REGULARISER = 0.1


def transport_plan(
    cost: torch.Tensor, regulariser: float = _REGULARISER, rounds: int = 100, tolerance: float = 1e-2
) -> torch.Tensor:
    """Sinkhorn's plan between uniform marginals; its mass is 1.

    Args:
        cost: ``[..., m, n]``.
        regulariser: weight of the plan's entropy.
        rounds: most scalings of rows and columns.
        tolerance: stop when the row scaling changes by less, mean over all rows of all plans.

    Returns:
        ``[..., m, n]`` float32.
    """
    kernel = (-cost.float() / regulariser).exp()
    rows, columns = cost.shape[-2:]
    row = kernel.new_ones(*cost.shape[:-1], 1)
    column = kernel.new_ones(*cost.shape[:-2], columns, 1)
    for _ in range(rounds):
        before = row
        row = 1 / rows / (kernel @ column)
        column = 1 / columns / (kernel.transpose(-1, -2) @ row)
        if (row - before).abs().mean() < tolerance:
            break
    return row * kernel * column.transpose(-1, -2)


def transport_into_anchors(
    x: torch.Tensor,
    anchors: torch.Tensor,
    grid: tuple[int, int],
    distance_weight: float = 0.5,
    nearest_weight: float = 0.1,
) -> torch.Tensor:
    """Move the tokens of each frame into its anchors (AOT, phase I).

    The cost of a move is ``(1 - cosine) + distance_weight * (Euclidean distance in the frame)``. An anchor becomes
    ``(anchor + moved) / (1 + mass)``; this is blended with the plain mean of the anchor and the tokens that are most
    similar to it.

    Args:
        x: tokens ``[F, P, D]``.
        anchors: which of them, ``[F, P]`` bool; equally many (``n``) in each frame.
        grid: rows and columns of a frame; both sides have length 1.
        distance_weight: see above.
        nearest_weight: of the plain mean in the blend.

    Returns:
        Weights of each anchor, in the order of the tokens, ``[F, n, P]``.
    """
    frames, size = anchors.shape
    staying = anchors.nonzero()[:, 1].view(frames, -1)
    moving = (~anchors).nonzero()[:, 1].view(frames, -1)
    number = staying.shape[1]
    weights = torch.zeros(frames, number, size, device=x.device)
    if moving.shape[1] == 0:
        return weights.scatter(2, staying.unsqueeze(-1), 1.0)
    unit = normalize(x.float(), dim=-1)
    frame = torch.arange(frames, device=x.device).unsqueeze(1)
    cosine = unit[frame, moving] @ unit[frame, staying].transpose(1, 2)
    places = torch.cartesian_prod(*(torch.linspace(0, 1, side, device=x.device) for side in grid))
    distance = torch.cdist(places, places)[moving.unsqueeze(2), staying.unsqueeze(1)]
    plan = transport_plan(1 - cosine + distance_weight * distance)
    moved = torch.zeros_like(weights)
    index = moving.unsqueeze(1).expand(-1, number, -1)
    for share, part in (
        (1 - nearest_weight, plan),
        (nearest_weight, one_hot(cosine.argmax(2), number).float()),
    ):
        whole = 1 + part.sum(1).unsqueeze(-1)
        moved.scatter_add_(2, index, share * part.transpose(1, 2) / whole)
        moved.scatter_add_(2, staying.unsqueeze(-1), share / whole)
    return moved


def absorb_repetition(
    frames: Sequence[torch.Tensor], new_ratio: float, moved_weight: float = 1.0, sigma: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the first frame of a clip absorb what the later ones repeat (AOT, phase II).

    Frame after frame, a plan between its tokens and the anchors (at first the tokens of the first frame) is made; the
    cost is ``1 - cosine``, shifted to start at 0, times ``1 - exp(-i^2 / (2 sigma^2))`` for the ``i``-th later frame.
    Tokens whose largest share of the plan's row is small match no anchor and stay; the others go into the anchors.

    Args:
        frames: tokens of each frame, ``[N_i, D]``.
        new_ratio: quantile of the largest shares below which a token stays.
        moved_weight: of what an anchor absorbs, its own being 1.
        sigma: in frames.

    Returns:
        Weights ``[K, sum N_i]`` of the first frame as it was, of the tokens that stay, and (when the clip has several
        frames) of the anchors at the end; and the numbers of the tokens that stay.
    """
    sizes = [len(frame) for frame in frames]
    unit = torch.eye(sum(sizes), device=frames[0].device)
    anchors, mix = frames[0].float(), unit[: sizes[0]]
    kept = []
    start = sizes[0]
    for step, frame in enumerate(frames[1:], 1):
        tokens = frame.float()
        cosine = normalize(tokens, dim=-1) @ normalize(anchors, dim=-1).T
        cost = 1 - cosine.clamp(-1 + 1e-6, 1 - 1e-6)
        cost = (cost - cost.min()) * (1 - math.exp(-(step**2) / (2 * sigma**2 + 1e-9)))
        plan = transport_plan(cost)
        shares = plan / plan.sum(1, keepdim=True)
        largest = shares.amax(1)
        stays = largest < torch.quantile(largest.double(), new_ratio)
        moved = moved_weight * shares.masked_fill(stays.unsqueeze(1), 0).T
        load = 1 + moved.sum(1, keepdim=True)
        anchors = (anchors + moved @ tokens) / load
        mix = (mix + moved @ unit[start : start + len(tokens)]) / load
        kept.append(start + stays.nonzero().squeeze(-1))
        start += len(tokens)
    if not kept:
        return mix, torch.zeros(0, dtype=torch.long, device=unit.device)
    stayed = torch.cat(kept)
    return torch.cat((unit[: sizes[0]], unit[stayed], mix)), stayed
