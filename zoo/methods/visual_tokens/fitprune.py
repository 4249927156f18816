"""FitPrune: Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models
(arXiv 2409.10197, AAAI 2025).

Every decoder layer deletes its own number of visual tokens: those with the smallest product of attention received
from the text and from other visual tokens, where the strongest head counts. The numbers are a recipe, fitted on a few
samples (``FitPrune.fit``): the attention mass may shrink by one tolerance in all layers, and that tolerance is searched
until a FLOPs target is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from zoo.engines.attention_mass import fit_recipe, strongest_received
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import VisualTokenReducer, keep
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy

TOKENS = 576
_AT_60 = "14 33 89 36 36 20 55 21 18 4 7 5 2 5 7 4 26 5 11 24 4 18 2 1 0 0 1 0 1 0 0 0"
_AT_90 = "262 153 80 19 13 1 2 0 0 0 0 0 0 0 0 1 1 2 1 2 0 1 0 0 0 0 0 1 0 0 0 0"
RECIPES = {
    1.0: (0,) * 32,
    0.4: tuple(map(int, _AT_60.split())),
    0.1: tuple(map(int, _AT_90.split())),
}
"""Tokens that each layer of LLaVA-1.5-7B deletes of 576, by the share of FLOPs that stays; released by the authors."""


@register("fitprune")
class FitPrune(VisualTokenReducer):
    """Deletes ``counts[l]`` of the visual tokens behind layer ``l``."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(
        0.4,
        ge=0.1,
        le=1,
        description="Share of the visual tokens' FLOPs that stays (1 - the paper's reduction ratio), without counts: "
        "the released recipes of LLaVA-1.5-7B for 0.4 and 0.1 are interpolated, and stretched to other depths.",
    )
    counts: tuple[int, ...] | None = Field(
        None,
        description="Visual tokens that each decoder layer deletes, as FitPrune.fit finds them; replaces keep_ratio.",
    )
    fitted_on: int = Field(
        TOKENS, ge=1, description="Visual tokens of the inputs that counts speak of; other inputs are scaled."
    )

    @model_validator(mode="after")
    def _counts_are_no_debts(self) -> FitPrune:
        if self.counts is not None and min(self.counts, default=0) < 0:
            raise ValueError("counts may not be negative")
        return self

    @classmethod
    def fit(
        cls,
        loaded: LoadedModel,
        samples: Iterable[Mapping[str, Any]],
        *,
        keep_ratio: float = 0.4,
        tolerance: float = 0.01,
    ) -> FitPrune:
        """The method with a recipe for ``loaded`` that meets a FLOPs target.

        Args:
            loaded: a vision-language model, without hooks of other methods.
            samples: inputs of one sample each, as the processor makes them; the paper takes some hundred.
            keep_ratio: share of the visual tokens' FLOPs in the decoder that shall stay.
            tolerance: the search for the loss of attention mass stops at an interval of this width.

        Raises:
            BadInput: no sample, or one with several rows.
        """
        recipe = fit_recipe(cls.slug, loaded, samples, keep_ratio, tolerance)
        return cls(counts=recipe.counts, fitted_on=recipe.tokens)

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage behind each layer that deletes. The last layer has no successor that would run short."""
        assert anatomy.decoder is not None
        depth = len(anatomy.decoder.layers)
        counts = stretched(between(RECIPES, self.keep_ratio), depth) if self.counts is None else self.counts
        return [
            Stage(layer + 1, partial(self.select, counts), observes=(layer,))
            for layer, count in enumerate(counts)
            if count and layer + 1 < max(depth, len(counts))
        ]

    def select(self, counts: Sequence[int], view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        layer = view.layer - 1
        before, after = (sum(counts[:end]) * view.total // self.fitted_on for end in (layer, layer + 1))
        cross, mutual = strongest_received(view, layer)
        return keep(least_attended(cross, mutual, min(after - before, len(cross) - 1))[1])


def least_attended(
    cross: torch.Tensor, mutual: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` tokens with the smallest ``cross * mutual [N]``, ascending, and the others in the same order."""
    order = (cross * mutual).argsort(stable=True)
    return order[:count], order[count:]


def between(recipes: Mapping[float, tuple[int, ...]], keep_ratio: float) -> tuple[int, ...]:
    """Counts for a ratio between two of ``recipes``, interpolated; those of a recipe itself as they are."""
    high, low = next(pair for pair in pairwise(sorted(recipes, reverse=True)) if keep_ratio >= pair[1])
    share = (high - keep_ratio) / (high - low)
    return tuple(
        round((1 - share) * some + share * more)
        for some, more in zip(recipes[high], recipes[low], strict=True)
    )


def stretched(counts: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Counts for a decoder of another depth: at the same fraction of the depth as many tokens are gone."""
    if depth == len(counts):
        return counts
    gone = [0, *accumulate(counts)]
    ends = [gone[layer * len(counts) // depth] for layer in range(depth + 1)]
    return tuple(after - before for before, after in pairwise(ends))
