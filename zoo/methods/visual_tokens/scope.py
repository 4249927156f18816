"""SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs (arXiv 2510.24214, NeurIPS 2025).

Greedy facility location on the vision encoder's output: the next token is the one whose gain in coverage (how much
better the picked tokens represent all patches, by cosine similarity), times its [CLS] attention, is largest. Picked
before the projector or after it, the same tokens enter the LLM.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.crops import Crop, crops_of, feature_layer, keep_per_crop, on_tokens
from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.reductions import Keep
from zoo.engines.selection import most_covering
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("scope")
class Scope(KeepsShare, VisualTokenReducer):
    """Keeps the visual tokens of each crop that cover it best, weighted by saliency."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.1111,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays (the paper: 192, 128, 64 of 576); every crop gets the "
        "same number.",
    )
    alpha: float = Field(1.0, ge=0, description="Exponent of the saliency; 0 is plain coverage.")
    combination: Literal["multi", "add"] = Field(
        "multi", description="Gain times saliency (multi), or their sum (add)."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer, which looks at the encoder layer that the projector reads."""
        if self.keeps_all:
            return []
        watch = EncoderWatch(feature_layer(anatomy), hidden=True) if has_cls(anatomy) else EncoderWatch(-1)
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=(watch,))]

    def select(self, anatomy: Anatomy, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        if has_cls(anatomy):
            layer, first = feature_layer(anatomy), torch.zeros(1, dtype=torch.long, device=view.tokens.device)

            def attention(image: ImageView) -> torch.Tensor:
                return image.encoder_rows(layer, first)[:, :, 0, image.prefix :].sum(1)

            saliency = on_tokens(view, attention)
            features = on_tokens(view, lambda image: image.encoder_hidden(layer)[:, image.prefix :])
        else:
            saliency, features = view.mean_attention(-1), view.tokens

        def choose(crop: Crop, share: int) -> torch.Tensor:
            return self.order(features[crop.tokens], saliency[crop.tokens], share)

        crops = len(crops_of(view))
        return keep_per_crop(view, max(1, self.count(len(view.tokens)) // crops * crops), choose)

    def order(self, features: torch.Tensor, saliency: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the kept rows of ``features [N, D]`` with ``saliency [N]``, in the order of picking."""
        weight = saliency.float().pow(self.alpha)
        return most_covering(features, weight, count, self.combination == "multi")


def has_cls(anatomy: Anatomy) -> bool:
    """Whether saliency is the attention of ``[CLS]``; otherwise it is the attention received from all patches."""
    return anatomy.encoder is not None and anatomy.encoder.has_cls
