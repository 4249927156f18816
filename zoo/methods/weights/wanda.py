"""Wanda: zero the weights whose magnitude times input norm is lowest within their output row.

Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024 (arXiv 2306.11695).
A weight matters as much as it is large *and* its input is (Eq. 1): ``|W_ij| * ||X_j||``. Weights compete within their
row, so every output loses the same share. Nothing is updated.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator

from zoo.engines.statistics import SquareSum
from zoo.engines.weight_masks import highest_in_groups, highest_in_rows
from zoo.families.weight_sparsity import WeightSparsifier
from zoo.interface import register
from zoo.models.anatomy import LinearPart


def importance(weight: torch.Tensor, square_sum: torch.Tensor) -> torch.Tensor:
    """``|W_ij| * sqrt(S_j)``, ``[out, in]`` float32, with ``S [in]`` from ``statistics.SquareSum``."""
    return weight.float().abs() * square_sum.to(weight.device).sqrt()


def by_cumulative_share(
    scores: torch.Tensor, sparsity: float, tolerance: float = 1e-3
) -> tuple[torch.Tensor, float]:
    """The paper's variant: each row loses its lowest scores as long as they sum to at most ``alpha`` of the row.

    Rows then lose different shares; ``alpha`` is bisected in [0, 0.8] until the matrix as a whole meets ``sparsity``.

    Args:
        scores: ``[out, in]``.
        sparsity: fraction of the matrix that leaves.
        tolerance: of the sparsity, and of ``alpha``.

    Returns:
        The mask of what stays, and ``alpha``.
    """
    ranked = scores.sort(dim=1).values
    share = ranked.cumsum(1)
    alpha, low, high = 0.4, 0.0, 0.8
    while True:
        count = (share <= alpha * scores.sum(1, keepdim=True)).sum(1, keepdim=True)
        # A row of which nothing fits loses all: index -1 is its maximum. It takes a weight above alpha of its row.
        kept = scores > ranked.gather(1, (count - 1) % scores.shape[1])
        removed = 1 - float(kept.float().mean())
        if abs(removed - sparsity) <= tolerance or high - low < tolerance:
            return kept, alpha
        if removed > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha


@register("wanda")
class Wanda(WeightSparsifier):
    """Weights times activation norms, compared within output rows or within n:m groups."""

    variant: bool = Field(
        False,
        description="Rows lose weights up to a common share of their summed scores, in place of a common number.",
    )

    @model_validator(mode="after")
    def _variant_has_no_pattern(self) -> Wanda:
        if self.variant and self.pattern is not None:
            raise ValueError("the variant lets rows differ, which a pattern forbids; give one of them")
        return self

    def observer(self, inputs: int) -> SquareSum:
        """The activation norms."""
        return SquareSum()

    def kept(self, weight: torch.Tensor, square_sum: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Mask ``[out, in]`` of the weights that stay."""
        scores = importance(weight, square_sum)
        group = self.group_at(sparsity)
        if group is not None:
            return highest_in_groups(scores, group)
        if self.variant:
            return by_cumulative_share(scores, sparsity)[0]
        return highest_in_rows(scores, sparsity)

    def sparsify(self, part: LinearPart, seen: SquareSum, sparsity: float) -> torch.Tensor:
        """The weights that stay, as they are."""
        return part.weight.where(self.kept(part.weight, seen.mean, sparsity), 0)
