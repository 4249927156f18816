"""FasterVLM: [CLS] Attention is All You Need for Training-Free Visual Token Pruning (arXiv 2412.01818).

Keep the patches that the encoder's [CLS] token attends to most, in the layer that feeds the projector. VisPruner, the
second version of the paper (ICCV 2025), spends only a share of the budget that way; the rest goes to the tokens that
are left when near-duplicates among the others are removed by repeated bipartite matching.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from zoo.engines.crops import Crop, class_attention, feature_layer, keep_per_crop, on_tokens
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.selection import thin_out_by_matching
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("fastervlm")
class FasterVLM(KeepsShare, VisualTokenReducer):
    """Keeps the visual tokens with the highest [CLS] attention, or (VisPruner) these and distinct others."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays (the paper's T / N), the same in every crop.",
    )
    important_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the budget that attention alone decides (VisPruner's rho; it uses 0.5); "
        "1 = FasterVLM.",
    )
    removed_per_round: int = Field(
        8, ge=1, description="Duplicates removed per round of matching (VisPruner; no effect at 1.0)."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at the encoder layer that feeds the projector."""
        if self.keeps_all:
            return []
        watch = EncoderWatch(feature_layer(anatomy), hidden=self.important_ratio < 1)
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=(watch,))]

    def select(self, anatomy: Anatomy, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        layer = feature_layer(anatomy)
        attention = class_attention(view, anatomy, layer)
        features = attention.unsqueeze(-1)
        if self.important_ratio < 1:
            features = on_tokens(view, lambda image: image.encoder_hidden(layer)[:, image.prefix :])

        def choose(crop: Crop, share: int) -> torch.Tensor:
            return self.choose(attention[crop.tokens], features[crop.tokens], share)

        return keep_per_crop(view, self.count(len(view.tokens)), choose)

    def choose(self, attention: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the kept tokens of one crop: the important ones by falling attention, then the distinct ones.

        Args:
            attention: of [CLS], mean over heads, ``[N]``.
            features: of the encoder, before the projector, ``[N, C]``; not looked at by FasterVLM.
            count: tokens to keep.
        """
        order = attention.float().argsort(descending=True, stable=True)
        important = int(count * self.important_ratio)
        if important == count:
            return order[:count]
        unit = normalize(features.float(), dim=-1)
        distinct = thin_out_by_matching(
            order[important:], unit @ unit.T, count - important, self.removed_per_round
        )
        return torch.cat((order[:important], distinct))
