"""HoloV: Don't Just Chase 'Highlighted Tokens' in MLLMs (arXiv 2510.02912, NeurIPS 2025).

Cut the sequence of visual tokens into crops, score each crop by its [CLS] attention and by how much the similarities
inside it vary, and share the budget between the crops in proportion. Inside a crop the tokens with the most [CLS]
attention stay.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.crops import class_attention, feature_layer
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.selection import proportional_shares
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy

_EPSILON = 1e-6
_SCALE = 1000.0
"""On the attention, in crops of two tokens and more."""


@register("holov")
class HoloV(KeepsShare, VisualTokenReducer):
    """Keeps the tokens with the highest [CLS] attention of every crop, a share for each crop."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.111, gt=0, le=1, description="Fraction of the visual tokens that stays (the paper's K / N)."
    )
    crops: int | None = Field(
        None,
        ge=1,
        description="Crops per picture (the paper's P), runs of the raster sequence. None = the release's choice: "
        "16 for pictures of a fixed size, 1024/576 N/K for others.",
    )
    beta: float = Field(0.09, ge=0, description="Weight of the variance term (1 in the paper's text).")
    redistribute: bool = Field(
        True,
        description="Give what a crop is too small for to the next best crops. "
        "False = as in the release, which fills up with zero vectors; these are left out here.",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at the encoder layer that feeds the projector."""
        if self.keeps_all:
            return []
        watch = EncoderWatch(feature_layer(anatomy))
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=(watch,))]

    def select(self, anatomy: Anatomy, view: View) -> Keep:
        """The kept tokens of one sample: picture by picture, crop by crop, by falling attention."""
        attention = class_attention(view, anatomy, feature_layer(anatomy))
        pictures = [image.tokens[~image.newline] for image in view.images]
        shares = proportional_shares(self.count(len(view.tokens)), [len(tokens) for tokens in pictures])
        kept = [
            tokens[self.choose(view.tokens[tokens], attention[tokens], share, self._crops(anatomy))]
            for tokens, share in zip(pictures, shares, strict=True)
            if share
        ]
        return Keep(torch.cat(kept).unsqueeze(0))

    def choose(
        self, features: torch.Tensor, attention: torch.Tensor, count: int, crops: int | None
    ) -> torch.Tensor:
        """Indices of the kept tokens of one picture, in the order of the release (not raster).

        Args:
            features: projected visual tokens, ``[N, D]``.
            attention: of [CLS], mean over heads, ``[N]``.
            count: tokens to keep (the paper's K), from 1 to ``N``.
            crops: ``None`` = by the formula of the Qwen version.

        Returns:
            ``[count]``; fewer when shares are not redistributed.
        """
        size, attention = len(features), attention.float()
        if crops is None:
            crops = max(1, int(1024 / 576 * size / count))
        lengths = [size // crops + (crop < size % crops) for crop in range(crops)]
        scores = torch.stack(
            [
                crop_score(crop, own, self.beta)
                for crop, own in zip(features.split(lengths), attention.split(lengths), strict=True)
            ]
        )
        kept, start = [], 0
        for length, share in zip(lengths, self._shares(scores, lengths, count), strict=True):
            if share >= length:
                kept.append(torch.arange(start, start + length, device=attention.device))
            elif share:
                kept.append(start + attention[start : start + length].topk(share).indices)
            start += length
        return torch.cat(kept)

    def _shares(self, scores: torch.Tensor, lengths: list[int], count: int) -> list[int]:
        """Tokens of each crop: its part of the total score, rounded down, and one more for the best crops."""
        weights = scores / (scores.sum() + _EPSILON)
        order = weights.argsort(descending=True, stable=True).tolist()
        shares = [int(share) for share in (weights * count).floor().tolist()]
        for crop in order[: count - sum(shares)]:
            shares[crop] += 1
        shares = [min(share, length) for share, length in zip(shares, lengths, strict=True)]
        if self.redistribute:
            left = count - sum(shares)
            for crop in order:
                more = min(left, lengths[crop] - shares[crop])
                shares[crop] += more
                left -= more
        return shares

    def _crops(self, anatomy: Anatomy) -> int | None:
        assert anatomy.encoder is not None
        if self.crops is None and anatomy.encoder.packed_order is None:
            return 16
        return self.crops


def crop_score(features: torch.Tensor, attention: torch.Tensor, beta: float) -> torch.Tensor:
    """Score of one crop: mean over its tokens of scaled attention plus ``beta * gamma`` times the variance (section 3).

    The variance of a token's similarities runs over all columns, the zeroed diagonal included; ``gamma`` brings it to
    the size of the attention. A crop of one token is scored by its attention, not scaled; an empty one by 0.

    Args:
        features: ``[M, D]``.
        attention: ``[M]`` float32.
        beta: weight of the variance.
    """
    size = len(features)
    if size <= 1:
        return attention.sum()
    features = features.float()
    unit = features / (features.norm(dim=-1, keepdim=True) + _EPSILON)
    similarity = (unit @ unit.T).fill_diagonal_(0)
    mean = similarity.sum(-1, keepdim=True) / (size - 1)
    variance = (similarity - mean).square().sum(-1) / (size - 1)
    scaled = _SCALE * attention
    gamma = scaled.abs().mean() / (variance.abs().mean() + _EPSILON)
    return (scaled + beta * gamma * variance).mean()
