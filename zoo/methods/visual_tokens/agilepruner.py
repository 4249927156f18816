"""AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning in Large
Vision-Language Models (arXiv 2603.01236, ICLR 2026).

Before the LLM, walk the visual tokens by descending [CLS] attention; each token that is kept suppresses its
near-duplicates. The radius grows with the token's rank and with the effective rank of the picture's features, so
complex pictures lean to diversity and simple ones to attention. Written from the published formula: there is no
official code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field

from zoo.engines.crops import Crop, class_attention, crops_of, feature_layer, keep_per_crop, on_tokens
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.selection import unit_rows
from zoo.engines.tokens import Positions, Stage, TokenReducer, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy


@register("agilepruner")
class AgilePruner(KeepsShare, VisualTokenReducer):
    """Keeps a fixed number of visual tokens per crop: the most attended ones that are not near-duplicates."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.2222,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays (the paper: 64, 128, 192 of 576).",
    )
    step: float = Field(
        0.01, ge=0, description="Growth of the cosine-distance threshold per rank, at average effective rank."
    )
    average_rank: float = Field(
        95.0,
        gt=0,
        description="Mean effective rank of encoder features (the paper's erank_avg); measure it for your encoder "
        "with average_effective_rank. The default is assumed for CLIP-L at 576 patches.",
    )
    max_threshold: float = Field(
        0.5, ge=0, le=2, description="Largest threshold (the paper's tau_max, whose value is not published)."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer, which looks at the encoder layer that the projector reads."""
        if self.keeps_all:
            return []
        watch = EncoderWatch(feature_layer(anatomy), hidden=True)
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=(watch,))]

    def select(self, anatomy: Anatomy, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        layer = feature_layer(anatomy)
        attention, features = class_attention(view, anatomy, layer), encoder_features(view, layer)

        def choose(crop: Crop, share: int) -> torch.Tensor:
            return self.order(features[crop.tokens], attention[crop.tokens], share)

        return keep_per_crop(view, self.count(len(view.tokens)), choose)

    def order(self, features: torch.Tensor, attention: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the kept rows of ``features [N, D]`` with ``attention [N]``, in the order of picking."""
        growth = self.step * effective_rank(features) / self.average_rank
        thresholds = (torch.arange(1, len(features) + 1) * growth).clamp(max=self.max_threshold)
        return suppressed_walk(features, attention, thresholds.to(features.device), count)


def suppressed_walk(
    features: torch.Tensor, scores: torch.Tensor, thresholds: torch.Tensor, count: int
) -> torch.Tensor:
    """Walk by descending score; each kept token removes those closer than its threshold from the walk.

    A walk that ends early goes on with the removed tokens, again by descending score.

    Args:
        features: ``[N, D]``.
        scores: ``[N]``; equal ones are walked in sequence order.
        thresholds: cosine distance for each rank, the largest score first, ``[N]``.
        count: tokens to keep, at most ``N``.

    Returns:
        Indices in the order of picking, ``[count]``.
    """
    order = scores.argsort(descending=True, stable=True)
    unit = unit_rows(features)[order]
    kept, removed, waiting = 0, 1, 2  # argmax finds the first token that waits, then the first one removed
    state = torch.full_like(order, waiting)
    picked = torch.empty(count, dtype=torch.long, device=features.device)
    for number in range(count):
        rank = state.argmax()
        picked[number] = rank
        near = 1.0 - unit @ unit[rank] < thresholds[rank]
        state = state.masked_fill(near & (state == waiting), removed)
        state[rank] = kept
    return order[picked]


def effective_rank(features: torch.Tensor) -> float:
    """``exp(-sum q ln q)`` with ``q`` the singular values of ``features [N, D]``, not centred, divided by their sum.

    Between 1 and ``min(N, D)``. (Roy and Vetterli, The effective rank, EUSIPCO 2007.)
    """
    # Roots of the Gram matrix's eigenvalues: float64, since the root doubles the relative error.
    rows = features.double()
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = spectrum / spectrum.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(share).sum().exp())


def encoder_features(view: View, layer: int) -> torch.Tensor:
    """Hidden state ``layer`` of the encoder for each visual token, mean over its patches, ``[N, D]`` float32."""
    return on_tokens(view, lambda image: image.encoder_hidden(layer)[:, image.prefix :])


def average_effective_rank(loaded: LoadedModel, inputs: Iterable[Mapping[str, Any]]) -> float:
    """The constant ``average_rank`` of a model: mean effective rank over the crops of some pictures.

    Args:
        loaded: a vision-language model.
        inputs: what the processor returns for each prompt with a picture.

    Raises:
        BadInput: ``inputs`` is empty.
        Refused: the model has no encoder to look into.
    """
    layer = feature_layer(loaded.anatomy)
    ranks: list[float] = []

    def note(view: View) -> Keep:
        features = encoder_features(view, layer)
        ranks.extend(effective_rank(features[crop.tokens]) for crop in crops_of(view))
        return keep(torch.arange(len(view.tokens), device=view.tokens.device))

    stage = Stage(-1, note, observes_encoder=(EncoderWatch(layer, attention=False, hidden=True),))
    reducer = TokenReducer(loaded.anatomy, [stage], "keep", AgilePruner.slug)
    try:
        with torch.no_grad():
            for entry in inputs:
                loaded.model(**entry)
    finally:
        reducer.close()
    if not ranks:
        raise BadInput("no picture was given to measure the effective rank on")
    return sum(ranks) / len(ranks)
