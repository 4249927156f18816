"""VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467, CVPR 2025).

Between encoder and projector, keep the patches with the highest [CLS] attention and [CLS] itself (dominant tokens), and
merge all others by the similarity of their keys into a few contextual tokens.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize, one_hot

from zoo.engines.crops import (
    class_attention,
    crops_of,
    distinct_places,
    feature_layer,
    merged_tokens,
    on_tokens,
    projects_patches,
    shares_of,
)
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Transform
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("visionzip")
class VisionZip(KeepsShare, VisualTokenReducer):
    """Keeps dominant tokens and merges the others into contextual ones."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.111,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays: dominant ([CLS] included) and contextual ones "
        "together, the same in every crop.",
    )
    contextual_ratio: float = Field(
        10 / 64,
        ge=0,
        le=1,
        description="Share of the budget for contextual tokens, rounded in every crop (the paper's 30 of 192, "
        "20 of 128, 10 of 64).",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at the encoder layer that feeds the projector."""
        if self.keeps_all:
            return []
        watch = EncoderWatch(feature_layer(anatomy), hidden=True)
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=(watch,))]

    def select(self, anatomy: Anatomy, view: View) -> Transform:
        """The tokens of one sample, crop by crop: [CLS], dominant ones in sequence order, contextual ones.

        Tiles that the model has joined to one grid come as in the release: dominant tokens of all tiles in the order
        of that grid, then the [CLS] of each tile, then their contextual tokens.
        """
        layer, size = feature_layer(anatomy), len(view.tokens)
        scores = class_attention(view, anatomy, layer)
        keys = on_tokens(view, lambda image: image.encoder_keys(layer)[:, :, image.prefix :].mean(1))
        crops = list(enumerate(crops_of(view)))
        shares = shares_of([crop for _, crop in crops], self.count(size))
        classes = None
        if projects_patches(view, anatomy):
            classes = torch.stack([crop.image.encoder_hidden(layer)[crop.number, 0] for _, crop in crops])
        sources = size + (0 if classes is None else len(classes))
        rows, places = [], []
        for _, joined in groupby(crops, key=lambda pair: pair[1].stretch):
            kept, centres, merges = [], [], []
            for number, crop in joined:
                own, contextual = crop.tokens, round(shares[number] * self.contextual_ratio)
                with_class = int(classes is not None and shares[number] > contextual)
                dominant = shares[number] - contextual - with_class
                best, targets, weight = compress(scores[own], keys[own], dominant, contextual)
                best = best.sort().values
                wanted = torch.cat((best.new_full((with_class,), -1), best, targets))
                taken = own[distinct_places(wanted, len(own))].split([with_class + dominant, contextual])
                cls = own.new_full((with_class,), size + number)
                kept.append(torch.stack((torch.cat((cls, own[best])), taken[0])))
                centres.append(taken[1])
                merges.append(weight.new_zeros(contextual, sources).index_copy(1, own, weight))
            picks = torch.cat(kept, dim=1)  # sources and places
            if len(kept) > 1:
                picks = picks[:, picks[0].argsort()]  # [CLS] counts on where the tokens end
            rows += [one_hot(picks[0], sources).to(scores), *merges]
            places += [picks[1], *centres]
        return merged_tokens(view, anatomy, torch.cat(rows), torch.cat(places), classes)


def compress(
    scores: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which patches of one crop stay, and how the others are merged (section 3.2).

    Every ``R // contextual``-th of the ``R`` other patches is a target; each of the rest goes to the target with the
    most similar key. A contextual token is its target plus the mean of those that came to it.

    Args:
        scores: attention of [CLS], ``[N]``.
        keys: mean over heads, ``[N, d]``.
        dominant: patches that stay ([CLS] not counted).
        contextual: merged tokens; together with ``dominant`` at most ``N``.

    Returns:
        The dominant patches by falling score ``[dominant]``, the targets ``[contextual]``, and the weights of all
        patches in each contextual token ``[contextual, N]``.
    """
    best = scores.topk(dominant).indices
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[best] = False
    others = rest.nonzero().squeeze(-1)
    weight = scores.new_zeros(contextual, len(scores), dtype=torch.float32)
    if not contextual:
        return best, others[:0], weight
    targets = others[:: max(1, len(others) // contextual)][:contextual]
    rest[targets] = False
    assigned = rest.nonzero().squeeze(-1)
    unit = normalize(keys.float(), dim=-1)
    nearest = (unit[assigned] @ unit[targets].T).argmax(-1)
    weight[nearest, assigned] = 1
    weight /= weight.sum(-1, keepdim=True).clamp(min=1)
    weight[torch.arange(contextual, device=targets.device), targets] = 1
    return best, targets, weight
