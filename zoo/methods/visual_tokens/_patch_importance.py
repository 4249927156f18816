"""How important patches are, from the vision encoder and from the pixels (VFlowOpt, arXiv 2508.05211)."""

from __future__ import annotations

from collections.abc import Callable

import torch

_ROWS = 64
"""Rows of encoder attention that are computed at once."""


def global_attention(
    received: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor], threshold: float
) -> torch.Tensor:
    """Mean attention that the global patches of each crop emit, ``[crops, P]`` float32.

    Global are those that receive more than ``threshold`` times the mean. A crop without any takes ``received`` itself,
    which is what all patches together emit.

    Args:
        received: attention received, mean over heads and queries, ``[crops, P]``.
        rows: from patches ``[R]`` to the attention they pay in every crop, mean over heads, ``[crops, R, P]``.
        threshold: the paper's t.
    """
    chosen = received > threshold * received.mean(-1, keepdim=True)
    asked = chosen.any(0).nonzero().squeeze(-1)
    if not len(asked):
        return received
    total = torch.zeros_like(received)
    for part in asked.split(max(1, min(_ROWS, received.shape[1] // 4))):
        total += (chosen[:, part].to(received).unsqueeze(1) @ rows(part)).squeeze(1)
    size = chosen.sum(-1, keepdim=True)
    return torch.where(size > 0, total / size.clamp(min=1), received)


def patch_entropy(pixels: torch.Tensor) -> torch.Tensor:
    """Entropy of the grey values of every patch, in bits.

    Args:
        pixels: 0 to 255, ``[..., 3, pixels]``.

    Returns:
        ``[...]`` float32.
    """
    grey = (0.3333 * pixels.float().sum(-2)).round().long().clamp(0, 255)
    counts = torch.zeros(*grey.shape[:-1], 256, device=grey.device)
    share = counts.scatter_add(-1, grey, torch.ones_like(grey, dtype=counts.dtype)) / grey.shape[-1]
    return -(share * (share + 1e-10).log2()).sum(-1)
