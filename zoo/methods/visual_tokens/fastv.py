"""FastV: An Image is Worth 1/2 Tokens After Layer 2 (arXiv 2403.06764, ECCV 2024).

In front of decoder layer K, rank the visual tokens by the attention that the last prompt token paid them in layer
K-1 (mean over heads) and drop the lowest for all deeper layers. Only that one row of attention is computed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("fastv")
class FastV(KeepsShare, VisualTokenReducer):
    """Keeps the visual tokens that the last prompt token attends to most."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays from `layer` on (the paper's 1 - R).",
    )
    layer: int = Field(
        2, ge=1, description="First decoder layer that runs short (the paper's K), counted from 0."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage in front of layer K, which looks at the attention of layer K-1."""
        return [] if self.keeps_all else [Stage(self.layer, self.select, observes=(self.layer - 1,))]

    def select(self, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        attention = view.attention(self.layer - 1, view.last)[:, 0]
        return keep(self.order(visual_scores(attention, view.index)))

    def order(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices of the kept tokens by descending ``scores [N]``."""
        return scores.topk(self.count(len(scores))).indices


def visual_scores(attention: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Attention of one query to the visual tokens, mean over heads, not renormalised.

    Args:
        attention: softmax row per head, ``[H, L]``.
        index: places of the visual tokens, ``[N]``.
    """
    return attention.float().mean(0)[index]
