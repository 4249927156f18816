"""LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388, ICCV 2025).

Between encoder and projector, keep the patches whose [CLS] attention is an outlier by the interquartile rule, so that
the number adapts to the picture, and add to each the features of its most similar patches, weighted with attention. One
summary token holds the rest. PruMerge+ also keeps a regular grid of patches.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.crops import crops_of, distinct_places, feature_layer, merged_tokens, on_tokens
from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.reductions import Transform
from zoo.engines.selection import unit_rows
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy

_LAST = -1
"""The encoder layer whose queries and keys are compared."""


@register("llava-prumerge")
class LlavaPruMerge(VisualTokenReducer):
    """Keeps outliers of [CLS] attention (and, +, a grid), enriched by their neighbours, and one summary token."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the patches that stays, the summary token not counted (the paper's ratio; with plus, "
        "half of it goes to the grid, so twice the ratio). None = adaptive, by the outlier rule.",
    )
    plus: bool = Field(True, description="PruMerge+ (the release's default): also keep a regular grid.")
    outlier_factor: float = Field(
        1.5,
        ge=0,
        description="Interquartile ranges above the upper quartile from which a patch is an outlier.",
    )
    neighbours: int = Field(32, ge=1, description="Most similar patches that are added to each kept one.")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at the projected layer and at queries and keys of the last one."""
        if self.keep_ratio == 1:
            return []
        watches = (EncoderWatch(feature_layer(anatomy), attention=False, hidden=True), EncoderWatch(_LAST))
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=watches)]

    def select(self, anatomy: Anatomy, view: View) -> Transform:
        """The tokens of one sample, crop by crop: kept ones by falling attention, the grid, the summary."""
        assert anatomy.encoder is not None
        has_cls = anatomy.encoder.has_cls

        def attention_of(image: ImageView) -> torch.Tensor:
            queries, keys = (
                _whole(part) for part in (image.encoder_queries(_LAST), image.encoder_keys(_LAST))
            )
            query = queries[:, 0] if has_cls else queries.mean(1)
            return headless_attention(query, keys)[:, image.prefix :]

        attention = on_tokens(view, attention_of)
        keys = on_tokens(view, lambda image: _whole(image.encoder_keys(_LAST))[:, image.prefix :])
        rows, places = [], []
        for crop in crops_of(view):
            own = crop.tokens
            centres = self.centres(attention[own])
            weight = self.enriched(attention[own], keys[own], centres)
            summary = centres.new_full((len(weight) - len(centres),), -1)
            rows.append(weight.new_zeros(len(weight), len(view.tokens)).index_copy(1, own, weight))
            places.append(own[distinct_places(torch.cat((centres, summary)), len(own))])
        return merged_tokens(view, anatomy, torch.cat(rows), torch.cat(places))

    def centres(self, attention: torch.Tensor, ratio: float | None = None) -> torch.Tensor:
        """Indices of the kept patches of one crop: the most attended, then (+) those of the grid.

        With a fixed ratio the grid may repeat a patch, as in the release; the adaptive one adds new ones only.

        Args:
            attention: ``[N]``.
            ratio: of outliers; ``None`` = that of this crop. Ignored when ``keep_ratio`` fixes it.
        """
        size = len(attention)
        if self.keep_ratio is not None:
            ratio = self.keep_ratio / 2 if self.plus else self.keep_ratio
        elif ratio is None:
            ratio = outlier_ratio(attention, self.outlier_factor)
        count = max(1, int(size * ratio))
        best = attention.topk(count).indices
        if not self.plus:
            return best
        ratio = max(ratio, 1 / size)
        step = int(1 / ratio)
        if self.keep_ratio is None:
            grid = torch.arange(0, max(1, size - 1), max(1, step // 3), device=best.device)
            return torch.cat((best, grid[~torch.isin(grid, best)]))
        places = [
            min(size - 1, int(step // 2 + number / ratio)) for number in range(min(count, size - count))
        ]
        return torch.cat((best, torch.tensor(places, device=best.device)))

    def enriched(self, attention: torch.Tensor, keys: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """Weights of all patches in each output token.

        A kept patch counts 1, and each of its nearest others (by cosine of keys) its attention; in the summary, all
        patches that are not kept count their attention. Where a patch is kept twice, the release loses as many
        patches from the front of the others; so do we.

        Args:
            attention: ``[N]``.
            keys: ``[N, C]``.
            centres: kept patches ``[M]``.

        Returns:
            ``[M + 1, N]``; ``[M, N]`` when nothing is left for a summary.
        """
        size, kept = len(attention), len(centres)
        left = torch.ones(size, dtype=torch.bool, device=centres.device)
        left[centres] = False
        others = left.nonzero().squeeze(-1)
        others = others[kept - (size - len(others)) :]
        entries = torch.cat((centres, others))
        unit = unit_rows(keys)
        closeness = unit[centres] @ unit[entries].T
        closeness.fill_diagonal_(-float("inf"))
        nearest = entries[closeness.topk(min(self.neighbours, len(entries) - 1)).indices]
        weight = attention.new_zeros(kept + bool(len(others)), size)
        weight[:kept].scatter_add_(1, nearest, attention[nearest])
        weight[:kept].scatter_add_(1, centres.unsqueeze(1), weight.new_ones(kept, 1))
        if len(others):
            weight[kept, others] = attention[others]
        return weight


def headless_attention(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention of one query to all keys as if there were a single head of the full width, ``[B, N]`` float32.

    Args:
        query: ``[B, C]``.
        keys: ``[B, N, C]``.
    """
    scores = (keys.float() @ query.float().unsqueeze(-1)).squeeze(-1)
    return (scores * query.shape[-1] ** -0.5).softmax(-1)


def outlier_ratio(attention: torch.Tensor, factor: float = 1.5) -> float:
    """Fraction of values above the upper quartile by more than ``factor`` interquartile ranges (section 3.2).

    Args:
        attention: any shape; all values are taken together.
        factor: see above.
    """
    values = attention.flatten().double()
    lower, upper = torch.quantile(
        values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device)
    )
    return (values > upper + factor * (upper - lower)).double().mean().item()


def _whole(heads: torch.Tensor) -> torch.Tensor:
    """``[crops, H, N, d]`` -> ``[crops, N, H d]``."""
    return heads.transpose(1, 2).flatten(2)
