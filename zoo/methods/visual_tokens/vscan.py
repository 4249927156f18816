"""VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models (arXiv 2505.22654, TMLR 2026).

Before the LLM, half of the budget goes to the patches that [CLS] attends to in every window of a shallow encoder layer
(local scan), half to those it attends to in a deep layer (global scan); every other token is averaged into the kept
one it resembles most. In front of a middle decoder layer, the attention that this layer would let the last prompt
token pay prunes once more.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.crops import class_attention, crops_of
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Join, Keep
from zoo.engines.selection import unit_rows
from zoo.engines.tokens import Positions, Stage, View
from zoo.engines.upcoming import look_ahead
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("vscan")
class VScan(KeepsShare, VisualTokenReducer):
    """Scans the encoder twice for the tokens that enter the LLM, and prunes them once inside."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        1 / 9,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays, mean over decoder layers (the paper's 64 of 576: 96 "
        "enter the LLM, 32 stay from `layer` 16 of 32 on).",
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of visual tokens that stay, mean over decoder layers; replaces keep_ratio.",
    )
    inside_ratio: float = Field(
        1 / 3, gt=0, le=1, description="Fraction that stays at `layer` of those that entered the LLM."
    )
    layer: int | None = Field(
        None,
        ge=1,
        description="First decoder layer after the second cut, counted from 0. None = half of the depth: the paper's "
        "16 of 32.",
    )
    local_share: float = Field(0.5, ge=0, le=1, description="Share of the first budget for the local scan.")
    window: int = Field(6, ge=1, description="Side of a window of the local scan, in tokens.")
    shallow_layer: int = Field(5, description="Encoder block of the local scan; negative from the end.")
    deep_layer: int = Field(-2, description="Encoder block of the global scan; negative from the end.")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM and one in front of the middle layer."""
        if self.keeps_all:
            return []
        assert anatomy.decoder is not None
        depth = len(anatomy.decoder.layers)
        layer = depth // 2 if self.layer is None else self.layer
        watches = (EncoderWatch(self.shallow_layer), EncoderWatch(self.deep_layer))
        stages = [Stage(-1, partial(self.scan, anatomy, layer / depth), observes_encoder=watches)]
        if self.inside_ratio < 1:
            stages.append(Stage(layer, partial(self.prune, anatomy, layer / depth)))
        return stages

    def counts(self, tokens: int, before: float) -> tuple[int, int]:
        """Tokens that enter the LLM, and that stay from ``layer`` on.

        Args:
            tokens: visual tokens of the sample.
            before: fraction of the decoder layers in front of ``layer``.

        Raises:
            BadInput: ``keep_tokens`` is more than there are.
        """
        mean = self.keep_ratio * tokens if self.keep_tokens is None else float(self.count(tokens))
        entering = mean / (before + (1 - before) * self.inside_ratio)
        if entering <= tokens:
            return max(1, round(entering)), max(1, round(entering * self.inside_ratio))
        # More than there are cannot enter: the second cut takes fewer.
        return tokens, max(1, round((mean - before * tokens) / (1 - before)))

    def scan(self, anatomy: Anatomy, before: float, view: View) -> Join | Keep:
        """What enters the LLM: kept tokens in sequence order, into which the others of their crop are averaged."""
        entering, _ = self.counts(view.total, before)
        if entering == view.total:
            return keep(torch.arange(view.total, device=view.index.device))
        shallow, deep = (
            class_attention(view, anatomy, layer) for layer in (self.shallow_layer, self.deep_layer)
        )
        stays = torch.ones(len(view.tokens), dtype=torch.bool, device=view.index.device)
        moved, target = [], []
        for crop in crops_of(view):
            own = crop.tokens
            count = max(1, round(entering / view.total * len(own)))
            place = crop.image.coordinates[crop.image.crop == crop.number][:, -2:]
            kept = self.scanned(shallow[own], deep[own], place - place.min(0).values, count)
            stays[own] = kept
            moved.append(own[~kept])
            target.append(own[kept][most_similar(view.tokens[own], kept)])
        anchor = stays.nonzero().squeeze(-1)
        slot = stays.long().cumsum(0) - 1
        return Join(
            anchor.unsqueeze(0),
            torch.cat(moved).unsqueeze(0),
            slot[torch.cat(target)].unsqueeze(0),
            len(view.tokens),
        )

    def scanned(
        self, shallow: torch.Tensor, deep: torch.Tensor, place: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Which tokens of one crop stay.

        The local scan takes equally many of every window, rounded down, so fewer than ``count`` may stay.

        Args:
            shallow: attention of [CLS] in the shallow layer, ``[N]``.
            deep: the same in the deep layer, ``[N]``.
            place: row and column in the crop's grid, ``[N, 2]``.
            count: budget, at most ``N``.

        Returns:
            ``[N]`` bool.
        """
        local = int(count * self.local_share)
        cell = place.div(self.window, rounding_mode="floor")
        _, window = cell.unique(dim=0, return_inverse=True)
        kept = best_of_groups(shallow, window, local // (int(window.max()) + 1))
        kept[deep.masked_fill(kept, -float("inf")).topk(count - local).indices] = True
        return kept

    def prune(self, anatomy: Anatomy, before: float, view: View) -> Keep:
        """What stays inside: the tokens that the last prompt token will attend to most, in sequence order."""
        assert anatomy.decoder is not None
        ahead = look_ahead(view, anatomy.decoder, view.last)
        scores = ahead.attention(view.layer, view.last)[:, 0].mean(0)[view.index]
        _, staying = self.counts(view.total, before)
        return keep(scores.topk(min(staying, len(scores))).indices)


def best_of_groups(scores: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """Marks the ``count`` highest ``scores [N]`` of every group, ``[N]`` bool; ``group [N]`` counts from 0."""
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[group[by_score].argsort(stable=True)]
    sizes = group.bincount()
    rank = torch.arange(len(scores), device=scores.device) - (sizes.cumsum(0) - sizes)[group[order]]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[rank < count], True)


def most_similar(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """For every token of ``tokens [N, D]`` that is not ``kept [N]``, the kept one of highest cosine.

    Returns:
        Numbers among the kept ones, ``[N - K]``.
    """
    unit = unit_rows(tokens)
    return (unit[~kept] @ unit[kept].T).argmax(1)
