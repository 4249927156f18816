"""SimPrune: which image tokens run, and whose output the others copy. Taken to be SiTo's operator; see the card."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from zoo.engines.denoising import Grid, Reuse


def base_tokens(score: torch.Tensor, grid: Grid, patch: tuple[int, int]) -> torch.Tensor:
    """The token of the highest score in every patch: indices ``[B, bases]``, patch by patch.

    Args:
        score: ``[B, N]`` on the grid, row by row.
        grid: rows and columns.
        patch: rows and columns of a patch; what is left over at the lower and right border has no base.
    """
    patch = min(patch[0], grid[0]), min(patch[1], grid[1])
    rows, columns = grid[0] // patch[0], grid[1] // patch[1]
    place = torch.arange(score.shape[1], device=score.device).view(grid)

    def patches(x: torch.Tensor) -> torch.Tensor:
        whole = x[..., : rows * patch[0], : columns * patch[1]]
        split = whole.unflatten(-1, (columns, patch[1])).unflatten(-3, (rows, patch[0]))
        return split.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    best = patches(score.unflatten(1, grid)).argmax(-1, keepdim=True)
    return patches(place).expand(len(score), -1, -1).gather(-1, best).squeeze(-1)


def similarity_prune(
    tokens: torch.Tensor,
    grid: Grid,
    noise: torch.Tensor,
    prune_ratio: float,
    *,
    patch: tuple[int, int] = (2, 2),
    beta: float = 1.0,
    alpha: float = 0.1,
) -> tuple[torch.Tensor, Reuse]:
    """SimPrune: drop the tokens that are most like a base token.

    With cosine similarity ``G``, ``score_i = beta * sum_j G_ij + alpha * noise_i`` makes the bases, the
    ``int(N * prune_ratio)`` others with the largest ``max_base G`` leave, and each gets the output of the kept token
    that it is most like. ``G`` itself is never made: its row sums need one product with the sum of all tokens.

    Args:
        tokens: ``[B, N, C]``.
        grid: rows and columns of the tokens.
        noise: standard normal, ``[B, N]`` or ``[1, N]`` for all samples alike.
        prune_ratio: share of the tokens that leave; bases never do.
        patch: rows and columns of the patches with one base each.
        beta, alpha: weights of similarity and noise.

    Returns:
        The bases ``[B, bases]``, and which tokens run for whom.
    """
    batch, total = tokens.shape[:2]
    unit = F.normalize(
        tokens.float(), dim=-1
    )  # near-ties are decided in float32 whatever the model computes in
    likeness = (unit @ unit.sum(1).unsqueeze(-1)).squeeze(-1)
    bases = base_tokens(beta * likeness + alpha * noise, grid, patch)
    nearest = (unit @ _rows(unit, bases).mT).amax(-1).scatter(1, bases, -torch.inf)
    pruned = min(int(total * prune_ratio), total - bases.shape[1])
    leaving = nearest.topk(pruned, dim=1).indices
    stays = torch.ones(batch, total, dtype=torch.bool, device=tokens.device).scatter(1, leaving, False)
    kept = stays.nonzero()[:, 1].view(batch, total - pruned)
    heir = (_rows(unit, leaving) @ _rows(unit, kept).mT).argmax(-1)
    own = stays.long().cumsum(1) - 1
    return bases, Reuse(kept, own.scatter(1, leaving, heir))


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
