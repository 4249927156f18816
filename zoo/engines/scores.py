"""Scores of input channels that several pruning methods use. ``weight`` is the outgoing matrix ``[out, channels]``."""

from __future__ import annotations

import torch


def weight_times_norm(weight: torch.Tensor, square_sum: torch.Tensor) -> torch.Tensor:
    """Wanda's score averaged over outputs: ``mean_i |W_ij| * sqrt(S_j)`` (Sun et al., arXiv 2306.11695).

    Args:
        weight: ``[out, channels]``.
        square_sum: squared activations per channel, ``[channels]`` (``statistics.SquareSum``).

    Returns:
        ``[channels]`` float32.
    """
    return (weight.float().abs() * square_sum.to(weight.device).sqrt()).mean(0)


def weighted_fluctuation(weight: torch.Tensor, fluctuation: torch.Tensor) -> torch.Tensor:
    """FLAP's WIFV: ``F_j * sum_i W_ij^2`` (An et al., arXiv 2312.11983), ``[channels]`` float32."""
    return fluctuation.to(weight.device) * weight.float().square().sum(0)


def mean_contribution(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What removed channels add to the output on average: the bias that replaces them, ``[out]`` float32.

    Args:
        weight: the full outgoing matrix ``[out, channels]``.
        mean: mean activation per channel, ``[channels]``.
        kept: mask ``[channels]``.
    """
    return weight.float() @ torch.where(kept, 0.0, mean.float().to(kept.device)).to(weight.device)
