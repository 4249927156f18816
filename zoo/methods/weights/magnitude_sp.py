"""Structured magnitude pruning: heads and channels with the smallest outgoing weights leave, without reading any text.

The data-free baseline in the code of FLAP (An et al., arXiv 2312.11983). It shows what looking at activations buys.
"""

from __future__ import annotations

from typing import Any

import torch

from zoo.interface import register
from zoo.methods.weights._uniform import UniformPruner


@register("magnitude-sp")
class MagnitudeSp(UniformPruner):
    """Lengths of weight columns."""

    def scores(self, weight: torch.Tensor, seen: Any) -> torch.Tensor:
        """``||W_:j||_2`` over the outputs."""
        return weight.float().norm(dim=0)
