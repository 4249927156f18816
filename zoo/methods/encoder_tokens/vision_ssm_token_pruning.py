"""ToP-ViM: Exploring Token Pruning in Vision State Space Models (arXiv 2409.18962, NeurIPS 2024).

A state-space model has no attention to rank tokens by, so a token counts as much as its scans give out: the positive
part of their output, summed over channels. A fixed share stays behind a few blocks. What leaves would tear the scan,
whose every state stands on its neighbour's; so the survivors keep their distances, and states are handed on across the
gaps (hidden-state alignment). Made for fine-tuning with the pruning on; runs on other models at a loss.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from zoo.engines.scan_tokens import ScanReducer, ScanView, Select
from zoo.families.scan_tokens import ScanTokenReducer
from zoo.interface import register
from zoo.models.anatomy import StateSpaceEncoder


@register("vision-ssm-token-pruning")
class ToPViM(ScanTokenReducer):
    """Keeps ``ceil(keep_ratio * n)`` of the ``n`` patches behind each pruning block, [CLS] counted in, one more where
    that is even: [CLS] always stays, and stands in the middle.
    """

    default_model = "small-vim"

    keep_ratio: float = Field(0.8, gt=0, le=1, description="Fraction of the patches kept at each stage.")
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (5, 10, 15),
        min_length=1,
        description="Blocks behind which patches leave, counted from 1 as in the paper.",
    )
    score: Literal["paper", "released"] = Field(
        "paper",
        description="Clipped output of both scans, or what the released code ranks by: the plain output of the "
        "backward scan, in flipped order.",
    )
    alignment: Literal["hold", "decay", "none"] = Field(
        "hold",
        description="Across a gap the state is held (paper), decays as for tokens of zeros, or the survivors are plain "
        "neighbours.",
    )

    def stages(self, encoder: StateSpaceEncoder) -> dict[int, Select]:
        """Behind each of the blocks."""
        if self.keep_ratio == 1:
            return {}
        return {block - 1: self.select for block in self.blocks}

    def reducer(self, encoder: StateSpaceEncoder) -> ScanReducer:
        """The engine, with the alignment asked for."""
        return ScanReducer(
            encoder,
            self.stages(encoder),
            self.slug,
            aligned=self.alignment != "none",
            decay_gaps=self.alignment == "decay",
        )

    def select(self, view: ScanView) -> torch.Tensor:
        """Places of the tokens that stay, ``[B, K]``."""
        output = view.output if self.score == "paper" else view.backward
        assert output is not None
        scores = importance(output) if self.score == "paper" else released_score(output)
        return keep_tokens(scores, self.keep_ratio, view.cls)

    def facts(self, reducer: Any) -> dict[str, float | int | str]:
        """Where patches left, and what became of the gaps."""
        return {"pruned behind blocks": ", ".join(map(str, self.blocks)), "state across gaps": self.alignment}


def importance(output: torch.Tensor) -> torch.Tensor:
    """``S_m = sum_d max(0, y_md)`` of the scans' output ``[B, N, C]``: ``[B, N]`` in float32."""
    return output.detach().float().clamp(min=0).sum(-1)


def released_score(backward: torch.Tensor) -> torch.Tensor:
    """The released code's score, ``[B, N]``: not clipped, and left in the order of the backward scan ``[B, N, C]``.

    So it ranks each token by the one that mirrors it. Kept for comparison with the release.
    """
    return backward.detach().float().sum(-1)


def keep_tokens(scores: torch.Tensor, keep_ratio: float, cls: int | None) -> torch.Tensor:
    """Places that stay, ``[B, K]``: the best patches in order, with [CLS] in their middle.

    ``k = ceil(n * keep_ratio)`` of ``n`` patches, one more if that is even, [CLS] counted in; without [CLS] just ``k``.

    Args:
        scores: ``[B, N]``.
        keep_ratio: fraction of the patches.
        cls: place of [CLS]; ``None`` without one.
    """
    if cls is None:
        kept = scores.topk(math.ceil(scores.shape[1] * keep_ratio), dim=1).indices
        return kept.sort(1).values
    count = math.ceil((scores.shape[1] - 1) * keep_ratio)
    count += count % 2 == 0
    scores = scores.index_fill(1, torch.tensor(cls, device=scores.device), -torch.inf)
    patches = scores.topk(count - 1, dim=1).indices.sort(1).values
    half = (count - 1) // 2
    middle = patches.new_full((len(scores), 1), cls)
    return torch.cat((patches[:, :half], middle, patches[:, half:]), dim=1)
