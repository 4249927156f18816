"""Wanda-sp: Wanda's scores, averaged over outputs, choose heads and channels; every layer loses the same ratio.

The structured baseline in the code of FLAP (An et al., arXiv 2312.11983), from Wanda (Sun et al., arXiv 2306.11695).
Each layer is measured on what the pruned layers before it put out. Nothing makes up for what leaves.
"""

from __future__ import annotations

import torch

from zoo.engines.scores import weight_times_norm
from zoo.engines.statistics import SquareSum
from zoo.interface import register
from zoo.methods.weights._uniform import UniformPruner


@register("wanda-sp")
class WandaSp(UniformPruner):
    """Weights times activation norms, mean over outputs."""

    def observer(self) -> SquareSum:
        """The activation norms."""
        return SquareSum()

    def scores(self, weight: torch.Tensor, seen: SquareSum) -> torch.Tensor:
        """``mean_i |W_ij| * sqrt(S_j)``."""
        return weight_times_norm(weight, seen.mean)
