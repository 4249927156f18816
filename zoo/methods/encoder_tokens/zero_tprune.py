"""Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers
(arXiv 2305.17328, CVPR 2024).

Behind a few blocks the attention map is read as a graph, and patches are ranked by a weighted PageRank on it. First
those leave that nearly repeat a more important one (S-stage), then those of lowest rank on the graph that is left
(I-stage). Nothing is merged, and no training is needed. No code was released: the card names what is reconstructed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch.nn.functional import normalize

from zoo.engines.attention_graph import page_rank, without
from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.reductions import Keep
from zoo.families.encoder_tokens import EncoderTokenReducer, require_blocks
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Encoder

Ratio = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[int, Field(ge=1)]


@register("zero-tprune")
class ZeroTPrune(EncoderTokenReducer):
    """Drops ``duplicates`` patches, then all but ``ceil(retention * n)`` of the others, behind each pruning block.

    [CLS], distillation token and registers are part of the graph and always stay; survivors keep their order.
    """

    layers: tuple[int, ...] = Field(
        (0, 2, 5, 8, 10), min_length=1, description="Blocks behind which patches leave, counted from 0."
    )
    retention: tuple[Ratio, ...] = Field(
        (1, 0.9, 0.8, 0.7, 1), description="Fraction kept by rank behind each of them, after the duplicates."
    )
    iterations: tuple[Steps, ...] = Field(
        (30, 5, 5, 1, 1), description="PageRank steps at each: many where attention is still spread out."
    )
    duplicates: int = Field(10, ge=0, description="Patches that leave as duplicates behind each block.")
    variance: tuple[float, float] = Field(
        (0.01, 0.7),
        description="Heads whose ranks vary less or more than this are left out: those that look everywhere, and "
        "those that see a few border patches only. Ranks are divided by the largest of the head before.",
    )

    @model_validator(mode="after")
    def _lists_fit(self) -> ZeroTPrune:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers holds a block twice")
        for name in ("retention", "iterations"):
            if len(getattr(self, name)) != len(self.layers):
                raise ValueError(f"{name} needs one number for each of the {len(self.layers)} layers")
        if self.variance[0] > self.variance[1]:
            raise ValueError("variance needs the lower bound first")
        return self

    def check(self, loaded: LoadedModel) -> None:
        """Refuse encoders that lack one of the pruning blocks."""
        super().check(loaded)
        require_blocks(self, loaded, self.layers)

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Behind each pruning block that drops anything."""
        return [
            BlockStage(block, partial(self.prune, retention=kept, iterations=steps), "after", observes=True)
            for block, kept, steps in zip(self.layers, self.retention, self.iterations, strict=True)
            if kept < 1 or self.duplicates
        ]

    def prune(self, view: BlockView, retention: float, iterations: int) -> Keep | None:
        """I'-stage (rank only), S-stage, I-stage."""
        prefix, before = view.prefix, view.tokens.shape[1] - view.prefix
        attention = view.attention(slice(None))
        patches = torch.arange(before, device=attention.device).expand(len(attention), -1)
        count = min(self.duplicates, before // 2)
        if count:
            score = importance(attention, iterations, self.variance, view.valid)[:, prefix:]
            gone = duplicates(view.mean_key[:, prefix:], score, count)
            stays = torch.ones_like(patches, dtype=torch.bool).scatter(1, gone, False)
            patches = patches[stays].view(len(patches), -1)
        left = patches.shape[1]
        target = math.ceil(retention * left)
        if target < left:
            valid = view.valid
            if count:
                survivors = view.behind_prefix(patches)
                attention = without(attention, survivors)
                valid = None if valid is None else valid.gather(1, survivors)
            score = importance(attention, iterations, self.variance, valid)[:, prefix:]
            best = score.topk(target, sorted=False).indices.sort(1).values
            patches = patches.gather(1, best)
        return None if patches.shape[1] == before else Keep(view.behind_prefix(patches))

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """The pruning blocks, and how many patches may leave there as duplicates."""
        return {
            "pruned behind blocks": ", ".join(map(str, self.layers)),
            "duplicates per block": self.duplicates,
        }


def importance(
    attention: torch.Tensor,
    iterations: int,
    variance: tuple[float, float],
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rank of each token over all heads, ``[B, N]``; padding has the lowest.

    The root of the mean square favours what matters much in one head over what matters a little everywhere. Heads
    whose variance lies outside of ``variance`` are left out, unless all do.

    Args:
        attention: ``[B, H, N, N]``.
        iterations: of the PageRank.
        variance: lowest and highest variance of a head's ranks over its tokens, the largest rank being 1.
        valid: ``[B, N]`` bool, ``False`` = padding.
    """
    rank = page_rank(attention, iterations, valid)
    spread = (rank / rank.amax(-1, keepdim=True)).var(-1, correction=0)
    used = (spread >= variance[0]) & (spread <= variance[1])
    used |= ~used.any(1, keepdim=True)
    square = (rank.square() * used.unsqueeze(-1)).sum(1) / used.sum(1, keepdim=True)
    return square.sqrt() if valid is None else square.sqrt().masked_fill(~valid, -1)


def duplicates(key: torch.Tensor, score: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` less important patches that are most like a more important one.

    Args:
        key: keys averaged over heads, ``[B, n, d]``; compared by their cosine.
        score: importance, ``[B, n]``. Candidates are the lower half (rounded down), references all others.
        count: at most ``n // 2``.

    Returns:
        ``[B, count]``, in no particular order.
    """
    order = score.argsort(1)
    half = order.shape[1] // 2
    feature = normalize(key, dim=-1)
    feature = feature.gather(1, order.unsqueeze(-1).expand(-1, -1, feature.shape[-1]))
    likeness = (feature[:, :half] @ feature[:, half:].transpose(1, 2)).amax(-1)
    padding = score.gather(1, order[:, :half]) < 0  # goes first
    likeness = likeness.masked_fill(padding, torch.inf)
    return order.gather(1, likeness.topk(count, sorted=False).indices)
