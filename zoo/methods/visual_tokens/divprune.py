"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175, CVPR 2025).

Before the LLM, keep the subset of projected visual tokens whose smallest pairwise cosine distance is largest: a
max-min diversity problem, solved by the greedy farthest-point rule. No importance score and no question is looked at.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.reductions import Keep
from zoo.engines.selection import farthest_points
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("divprune")
class DivPrune(KeepsShare, VisualTokenReducer):
    """Keeps ``round(keep_ratio * N)`` mutually distant visual tokens."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.098, gt=0, le=1, description="Fraction of the visual tokens that stays (the paper's r)."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer."""
        return [] if self.keeps_all else [Stage(-1, self.select)]

    def select(self, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        return keep(self.order(view.tokens))

    def order(self, tokens: torch.Tensor) -> torch.Tensor:
        """Indices of the kept rows of ``tokens [N, D]``, in the order of picking."""
        return farthest_points(tokens, self.count(len(tokens)))
