"""ToMe: Token Merging: Your ViT But Faster (arXiv 2210.09461, ICLR 2023).

In every block, between attention and MLP, the ``r`` most similar pairs of tokens are merged, found by bipartite soft
matching of their keys. A token that stands for several is a mean weighted by sizes, and attention counts it as many
times ("proportional attention": the log of its size is added to its logits). No training is needed.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.matching import bipartite_soft_matching, merge_schedule, merges
from zoo.engines.reductions import Join
from zoo.families.encoder_tokens import EncoderTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Encoder

Merges = Annotated[int, Field(ge=0)]


@register("tome")
class ToMe(EncoderTokenReducer):
    """Merges ``r`` tokens per block. [CLS], distillation token and registers neither go nor receive others."""

    counts_sizes: ClassVar[bool] = True

    r: Merges | tuple[Merges, ...] = Field(
        13,
        description="Tokens merged per block (13 for ViT-S/16 at 224 px, 16 for B, 8 for L), or one number for each "
        "block; at most half of the patches go in one block.",
    )
    inflection: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="Slope of r over the blocks: -1 falls from 2r to 0, 1 rises from 0 to 2r.",
    )
    proportional_attention: bool = Field(
        True,
        description="Attention counts a merged token by its size; off for MAE models that were not tuned.",
    )

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Between the halves of every block that merges anything."""
        schedule = merge_schedule(len(encoder.blocks), self.r, self.inflection)
        return [
            BlockStage(block, partial(self.merge, r=r), observes=True)
            for block, r in enumerate(schedule)
            if r > 0
        ]

    def merge(self, view: BlockView, r: int) -> Join | None:
        """Size-weighted means of the ``r`` best pairs, compared by their keys averaged over heads."""
        if merges(view.tokens.shape[1], view.prefix) == 0:
            return None
        sizes = view.sizes if view.merged else None
        if view.valid is not None:
            # Padding weighs next to nothing: not zero, so that padding may merge with padding.
            sizes = view.sizes.clamp(min=1e-6)
        return bipartite_soft_matching(view.mean_key, r, view.prefix, sizes, view.valid)

    def key_bias(self, view: BlockView) -> torch.Tensor | None:
        """Equation 1 of the paper: log of the token size; none while no token has been merged."""
        return view.sizes.log() if view.merged else None

    def biases(self, encoder: Encoder) -> bool:
        """Only with proportional attention."""
        return self.proportional_attention

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """The schedule asked for (half of the patches is the most that a block merges)."""
        schedule = merge_schedule(len(reducer.encoder.blocks), self.r, self.inflection)
        return {"r per block": ", ".join(map(str, schedule))}
