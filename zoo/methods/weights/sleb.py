"""SLEB: remove the decoder blocks whose absence is verified to hurt least, one at a time.

Song et al.: SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
Transformer Blocks, ICML 2024 (arXiv 2402.09025). Every block that is left is switched off in turn, and the one without
which the calibration text is most likely goes for good; so each choice takes the earlier ones into account (the paper's
third metric).
"""

from __future__ import annotations

import torch
from pydantic import Field

from zoo.engines.removal_search import whole_layers
from zoo.engines.surgery import Block
from zoo.families.greedy_removal import GreedyRemover
from zoo.interface import register
from zoo.models.anatomy import Decoder


@register("sleb")
class Sleb(GreedyRemover):
    """Redundancy verification and elimination of whole layers."""

    sparsity: float = Field(
        0.2, ge=0, lt=1, description="Fraction of decoder layers to remove, rounded to whole layers."
    )
    early_barrier: int = Field(
        1, ge=0, description="How many of the first layers, of those left, may not leave."
    )
    latter_barrier: int = Field(
        1, ge=0, description="How many of the last layers, of those left, may not leave."
    )

    def blocks(self, decoder: Decoder) -> list[Block]:
        """Whole layers."""
        return whole_layers(decoder)

    def candidates(self, left: list[Block]) -> list[Block]:
        """All between the barriers."""
        return left[self.early_barrier : len(left) - self.latter_barrier]

    def score(self, losses: torch.Tensor, tokens: int) -> float:
        """Negative log-likelihood of the text: mean losses times the length of a window, summed, as in the code."""
        return float((losses * tokens).sum())
