"""Random visual tokens: the control of UniPruneBench (arXiv 2511.02650).

A uniformly random subset stays, before the LLM or in front of chosen decoder layers. Any rule that looks at the tokens
has to beat it, at the same places and with the same rounding. A regular stride is offered as a stronger control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy

_ROUNDING: dict[str, Callable[[float], int]] = {"floor": int, "round": round, "ceil": math.ceil}


@register("random-tokens")
class RandomTokens(KeepsShare, VisualTokenReducer):
    """Keeps ``int(keep_ratio * N)`` visual tokens drawn without replacement."""

    keep_ratio: float = Field(0.5, gt=0, le=1, description="Fraction of the visual tokens that stays.")
    layer: int = Field(
        -1, ge=-1, description="Decoder layer in front of which tokens leave; -1 = before the LLM."
    )
    schedule: dict[Annotated[int, Field(ge=-1)], Annotated[float, Field(ge=0, le=1)]] = Field(
        {},
        description="Successive cuts, layer: fraction of the tokens arriving there that stays (0 = none, inside the "
        "LLM); replaces layer, keep_ratio and keep_tokens.",
    )
    rounding: Literal["floor", "round", "ceil"] = Field(
        "floor", description="How a fraction becomes a number: choose that of the method compared with."
    )
    mode: Literal["uniform", "grid"] = Field("uniform", description="Random draw, or every so-many-th token.")
    order: Literal["sequence", "permutation"] = Field(
        "sequence", description="Order of the kept tokens: as in the prompt, or as drawn."
    )
    seed: int = Field(0, ge=0, description="Seed of the draw.")

    @field_validator("layer")
    @classmethod
    def _before_the_llm(cls, layer: int) -> int:
        return layer or -1  # in front of layer 0 and before the LLM are the same place

    @field_validator("schedule")
    @classmethod
    def _one_cut_per_place(cls, schedule: dict[int, float]) -> dict[int, float]:
        if {-1, 0} <= schedule.keys():
            raise ValueError("-1 and 0 are the same place: give one of them")
        return {layer or -1: ratio for layer, ratio in schedule.items()}

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage per cut that removes something."""
        if not self.schedule and self.keeps_all:
            return []
        cuts = self.schedule or {self.layer: self.keep_ratio}
        fixed = not self.schedule and self.keep_tokens is not None
        return [
            Stage(layer, self.select, seed=self.seed) for layer, ratio in cuts.items() if fixed or ratio < 1
        ]

    def select(self, view: View) -> Keep:
        """The kept tokens of one sample; before the LLM, thumbnails and all other views are sampled apart."""
        groups = [torch.arange(len(view.tokens))]
        if view.layer < 0 and (self.schedule or self.keep_tokens is None):
            groups = _thumbnails_apart(view)
        kept = self.draw(groups, view.layer, view.generator).to(view.index.device)
        return keep(kept) if self.order == "sequence" else Keep(kept.unsqueeze(0))

    def draw(self, groups: Sequence[torch.Tensor], layer: int, generator: torch.Generator) -> torch.Tensor:
        """Members of each of the ``groups`` (indices ``[n_g]``) that stay in front of ``layer``, as drawn, ``[K]``."""
        drawn = []
        for group in groups:
            number = self.number(len(group), layer)
            if self.mode == "grid":
                chosen = strided(len(group), number)
            else:
                chosen = torch.randperm(len(group), generator=generator)[:number]
            drawn.append(group[chosen])
        return torch.cat(drawn)

    def number(self, tokens: int, layer: int) -> int:
        """How many of ``tokens`` stay in front of ``layer``: at least 1 before the LLM, possibly none inside."""
        if not self.schedule and self.keep_tokens is not None:
            return self.count(tokens)
        ratio = self.schedule.get(layer, self.keep_ratio)
        return max(1 if layer < 0 else 0, _ROUNDING[self.rounding](tokens * ratio))


def strided(tokens: int, number: int) -> torch.Tensor:
    """``number`` of ``tokens`` places at equal distances, centred, ``[number]``: ``floor((2 i + 1) N / (2 K))``."""
    return (2 * torch.arange(number) + 1) * tokens // (2 * max(number, 1))


def _thumbnails_apart(view: View) -> list[torch.Tensor]:
    """Tokens of thumbnails, then all others; without a thumbnail (or without tiles) one group."""
    thumbnail = torch.zeros(len(view.tokens), dtype=torch.bool)
    for image in view.images:
        thumbnail[image.tokens.cpu()] = image.thumbnail.cpu()
    groups = [flag.nonzero().squeeze(-1) for flag in (thumbnail, ~thumbnail)]
    return [group for group in groups if len(group)]
