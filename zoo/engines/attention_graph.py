"""Attention read as a graph: how much mass each token ends up with when every token passes its own on.

Pure tensor functions on attention maps ``[B, H, N, N]`` whose rows sum to 1: row ``i`` says how query ``i`` shares its
attention out among the keys.
"""

from __future__ import annotations

import torch


def page_rank(attention: torch.Tensor, iterations: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted PageRank without damping: ``s <- A^T s``, from equal shares; important is what the important attend to.

    Args:
        attention: ``[B, H, N, N]``.
        iterations: steps; one step is the column mean.
        valid: ``[B, N]`` bool; padding (``False``) has no mass to pass on.

    Returns:
        ``[B, H, N]``; the mass of each head sums to 1.
    """
    batch, heads, tokens, _ = attention.shape
    start = attention.new_ones(batch, tokens) if valid is None else valid.to(attention.dtype)
    mass = (start / start.sum(1, keepdim=True))[:, None, None].expand(-1, heads, 1, -1)
    for _ in range(iterations):
        mass = mass @ attention
    return mass.squeeze(2)


def without(attention: torch.Tensor, survivors: torch.Tensor) -> torch.Tensor:
    """The graph of the tokens ``survivors [B, K]`` alone, its rows made to sum to 1 again: ``[B, H, K, K]``."""
    tokens = attention.shape[-1]
    heads = attention.shape[1]
    rows = survivors[:, None, :, None].expand(-1, heads, -1, tokens)
    columns = survivors[:, None, None, :].expand(-1, heads, survivors.shape[1], -1)
    rest = attention.gather(2, rows).gather(3, columns)
    return rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
