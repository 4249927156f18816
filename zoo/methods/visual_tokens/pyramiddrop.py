"""PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction
(arXiv 2410.17247, CVPR 2025).

The decoder is split into stages. At the end of each, the visual tokens are ranked by the attention of the last prompt
token, and only a fixed share stays. As in the release, that attention is the one that the next layer is about to pay:
its norm and projections on the stage's output. One query and the keys are computed, never a map.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.engines.upcoming import look_ahead
from zoo.families.visual_tokens import VisualTokenReducer, in_proportion, keep
from zoo.interface import register
from zoo.methods.visual_tokens.fastv import visual_scores
from zoo.models.anatomy import Anatomy, Decoder

LAYERS = (8, 16, 24)
"""Layers that end a stage in the release, counted from 1, of 32."""


@register("pyramiddrop")
class PyramidDrop(VisualTokenReducer):
    """Keeps ``int(N * keep_ratio**j)`` of ``N`` visual tokens after stage ``j = 1, 2, ...``"""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Fraction of its visual tokens that each stage passes on (the paper's lambda).",
    )
    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="Layers that end a stage, counted from 1 (layer_list). None = 8, 16, 24 of 32, in proportion.",
    )
    keep_ratios: tuple[float, ...] | None = Field(
        None,
        description="Fraction of all visual tokens that stays after each stage (image_token_ratio_list); replaces "
        "keep_ratio.",
    )
    ranked_by: Literal["next-layer", "last-layer"] = Field(
        "next-layer",
        description="Whose attention ranks: that of the layer about to run (the release), or of the last one of the "
        "stage (the paper's text).",
    )

    @model_validator(mode="after")
    def _one_ratio_per_stage(self) -> PyramidDrop:
        ratios = self.keep_ratios
        if self.layers is not None and (self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers))):
            raise ValueError("layers must be at least 1 and ascend")
        if ratios is not None:
            if len(ratios) != len(self.layers or LAYERS):
                raise ValueError(
                    f"keep_ratios needs one ratio for each of {len(self.layers or LAYERS)} stages"
                )
            if not all(0 < ratio <= 1 for ratio in ratios) or list(ratios) != sorted(ratios, reverse=True):
                raise ValueError("keep_ratios must lie in (0, 1] and may not rise")
        return self

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage behind each of ``layers``."""
        assert anatomy.decoder is not None
        layers = self.layers or in_proportion(LAYERS, len(anatomy.decoder.layers))
        ratios = self.keep_ratios or [self.keep_ratio ** (j + 1) for j in range(len(layers))]
        ahead = self.ranked_by == "next-layer"
        return [
            Stage(layer, partial(self.select, anatomy.decoder, ratio), observes=() if ahead else (layer - 1,))
            for layer, ratio in zip(layers, ratios, strict=True)
            if ratio < 1
        ]

    def select(self, decoder: Decoder, ratio: float, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order: ``int(ratio * N)`` of the ``N`` it began with."""
        scores = self.scores(decoder, view)
        return keep(scores.topk(min(int(view.total * ratio), len(scores))).indices)

    def scores(self, decoder: Decoder, view: View) -> torch.Tensor:
        """Attention of the last prompt token to each visual token, mean over heads, ``[N]``."""
        ahead = self.ranked_by == "next-layer"
        layer = view.layer if ahead else view.layer - 1
        seeing = look_ahead(view, decoder, view.last) if ahead else view
        return visual_scores(seeing.attention(layer, view.last)[:, 0], view.index)
