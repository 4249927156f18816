"""HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models (arXiv 2508.00553).

A middle layer of the encoder looks at objects, its last layers at the whole picture. Keep a few tokens that receive the
most attention in the former (anchors) with their neighbours in the grid (buffers), and fill the budget with those that
receive the most in the layer that feeds the projector (registers).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.crops import Crop, feature_layer, keep_per_crop
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("hiprune")
class HiPrune(KeepsShare, VisualTokenReducer):
    """Keeps anchors with their neighbours, and registers."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.334,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays (the release's retention), the same in every crop.",
    )
    alpha: float = Field(0.1, ge=0, le=1, description="Share of the budget for anchors and their neighbours.")
    object_layer: int | None = Field(
        None,
        ge=1,
        description="Encoder layer that looks at objects, counted from 1. "
        "None = the release's choice: 9 of an encoder with [CLS] (CLIP), 16 of others (Qwen2.5-VL).",
    )
    edge_safe: bool = Field(
        False,
        description="Take spatial neighbours only. False = as in the release: the left neighbour of a row's first "
        "token is the last one of the row above, and places outside the grid become its first or last token.",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at two encoder layers."""
        if self.keeps_all:
            return []
        watched = (EncoderWatch(self._object_layer(anatomy)), EncoderWatch(feature_layer(anatomy)))
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=watched)]

    def select(self, anatomy: Anatomy, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        objects = view.mean_attention(self._object_layer(anatomy))
        registers = view.mean_attention(feature_layer(anatomy))

        def choose(crop: Crop, share: int) -> torch.Tensor:
            return self.choose(objects[crop.tokens], registers[crop.tokens], share, crop.columns)

        return keep_per_crop(view, self.count(len(view.tokens)), choose)

    def choose(
        self, objects: torch.Tensor, registers: torch.Tensor, count: int, columns: int
    ) -> torch.Tensor:
        """Indices of the ``count`` kept tokens of one crop: anchors and buffers, then registers.

        Args:
            objects: attention received in the object layer, ``[N]``.
            registers: attention received in the layer that feeds the projector, ``[N]``.
            count: tokens to keep, at most ``N``.
            columns: width of the grid.
        """
        anchors = objects.topk(round(count * self.alpha / 5)).indices
        local = self._around(anchors, len(objects), columns)
        if len(local) > count:  # five places each can be more than the budget: the most looked-at of them
            local = local[objects[local].argsort(descending=True)[:count]]
        others = registers.clone()
        others[local] = -float("inf")
        return torch.cat((local, others.topk(count - len(local)).indices))

    def _around(self, anchors: torch.Tensor, size: int, columns: int) -> torch.Tensor:
        """Anchors and their four neighbours, without repetition."""
        steps = torch.tensor([0, -1, 1, -columns, columns], device=anchors.device)
        places = anchors.unsqueeze(1) + steps
        if self.edge_safe:
            column = (anchors % columns).unsqueeze(1)
            same_row = (steps.abs() != 1) | ((column + steps >= 0) & (column + steps < columns))
            if columns == 1:  # a step of one is a step to the next row
                same_row = torch.ones_like(places, dtype=torch.bool)
            places = places[same_row & (places >= 0) & (places < size)]
        return places.clamp(0, size - 1).unique()

    def _object_layer(self, anatomy: Anatomy) -> int:
        """Counted from 0."""
        assert anatomy.encoder is not None
        chosen = self.object_layer or (9 if anatomy.encoder.has_cls else 16)
        return chosen - 1
