"""BlockPruner: remove attention blocks and MLP blocks one at a time, each when the perplexity without it is lowest.

Zhong et al.: BlockPruner: Fine-grained Pruning for Large Language Models, Findings of ACL 2025
(arXiv 2406.10594). A layer is two residual blocks, and they are not equally redundant. The importance of a block is the
perplexity of the calibration text once it is masked, on top of all earlier removals; the search is greedy.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from zoo.engines.removal_search import half_layers
from zoo.engines.surgery import Block
from zoo.families.greedy_removal import GreedyRemover
from zoo.interface import register
from zoo.models.anatomy import Decoder


@register("blockpruner")
class BlockPruner(GreedyRemover):
    """Greedy removal of half layers. The paper's budget is a number of blocks: ``layers`` counts them."""

    sparsity: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Fraction of the attention and MLP blocks to remove, rounded to whole ones.",
    )
    layers: int | None = Field(
        None, ge=0, description="How many attention and MLP blocks to remove; takes the place of sparsity."
    )
    block_type: Literal["mix", "mha", "mlp"] = Field(
        "mix", description="What may leave: both kinds of block, only attention, or only MLPs."
    )

    def blocks(self, decoder: Decoder) -> list[Block]:
        """Attention and MLP of every layer."""
        return half_layers(decoder)

    def candidates(self, left: list[Block]) -> list[Block]:
        """Attention blocks by layer, then MLP blocks by layer, as in the code; the last attention block stays."""
        attention = [block for block in left if block.part == "attention"]
        mlp = [block for block in left if block.part == "mlp"]
        return [
            *(attention if self.block_type != "mlp" and len(attention) > 1 else ()),
            *(mlp if self.block_type != "mha" else ()),
        ]

    def score(self, losses: torch.Tensor, tokens: int) -> float:
        """Perplexity: ``exp`` of the mean over windows of their mean losses."""
        return float(losses.mean().exp())
