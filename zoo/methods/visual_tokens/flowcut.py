"""FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models (arXiv 2505.19536).

Inside the vision encoder, every second block drops patches by a running score of [CLS] attention, similarity to the
value of [CLS], and size of the value; the entropy of the attention says how many go. For pictures in tiles the paper
makes a second cut inside the LLM, by the same score seen from the last prompt token.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.blocks import BlockStage, BlockView
from zoo.engines.crops import feature_layer
from zoo.engines.reductions import Keep
from zoo.engines.selection import highest_of_each
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, keep
from zoo.families.visual_tokens_in_encoder import InEncoderReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy

_VIEWS = 5
"""Crops of a picture in tiles for which the release fixes its budgets: a thumbnail and four tiles."""


@register("flowcut")
class FlowCut(KeepsShare, InEncoderReducer):
    """Drops patches step by step inside the encoder, down to a fixed number per crop."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.111, gt=0, le=1, description="Fraction of the patches of each crop that stays (the paper's T / N)."
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of visual tokens that stay of each picture (T), of five crops in models that tile "
        "pictures; replaces keep_ratio.",
    )
    llm_layer: int | None = Field(
        None,
        ge=0,
        description="Decoder layer (counted from 0) after which pictures in tiles are cut to the budget; the encoder "
        "then leaves half of the budget of five crops in each (the paper's way, with layer 1). None = the encoder "
        "makes the whole cut.",
    )
    largest_cut_for_all: bool = Field(
        False,
        description="As the release does: what the sample with the largest cut loses in a block, all samples of the "
        "batch lose. False = every sample by its own attention, whatever stands beside it.",
    )

    def encoder_stages(self, anatomy: Anatomy) -> list[BlockStage]:
        """One stage behind each block in front of the last one that is projected."""
        if self.keeps_all:
            return []
        assert anatomy.encoder is not None
        last = feature_layer(anatomy) % len(anatomy.encoder.blocks)
        return self.cuts(last, tiled=_tiles(anatomy))

    def cuts(self, last: int, tiled: bool = False) -> list[BlockStage]:
        """Stages behind the blocks ``0 .. last - 1``; ``tiled`` = the crops are parts of a larger picture."""
        return [
            BlockStage(block, partial(self.cut, last - block - 1, tiled), place="after", observes=True)
            for block in range(last)
        ]

    def decoder_stages(self, anatomy: Anatomy) -> list[Stage]:
        """For models that tile pictures: one stage behind ``llm_layer``, which it looks at."""
        if self.llm_layer is None or not _tiles(anatomy):
            return []
        return [Stage(self.llm_layer + 1, partial(self.select, self.llm_layer), observes=(self.llm_layer,))]

    def cut(self, remaining: int, tiled: bool, view: BlockView) -> Keep | None:
        """Survivors of one block, for all crops of a batch; ``remaining`` blocks follow up to the last cut."""
        prefix, size = view.prefix, view.tokens.shape[1] - view.prefix
        target: int = view.memory.setdefault("target", self._target(size, tiled))
        if size <= target:
            return None
        there = torch.ones(view.tokens.shape[:2], dtype=torch.bool, device=view.tokens.device)
        there = there if view.valid is None else view.valid
        attention = view.attention(slice(0, 1))[:, :, 0].mean(1)[:, prefix:]
        values = view.seen.value.float()
        alike = (values[:, :, :1] @ values.transpose(-1, -2)).masked_fill(
            ~there[:, None, None], -float("inf")
        )
        alike = alike.softmax(-1)[:, :, 0].mean(1)[:, prefix:]
        there = there[:, prefix:]
        score = flow_score(attention * there, alike * there, values.mean(1)[:, prefix:])
        history = view.memory.get("score")
        view.memory["score"] = score = score if history is None else 0.5 * history + 0.5 * score
        if remaining % 2:
            return None
        sizes = there.sum(-1)
        cuts = cut_size(attention * there, sizes, target, remaining)
        if self.largest_cut_for_all:
            cuts = cuts.max().expand_as(cuts)
        stay = (sizes - cuts.round().long()).clamp(min=target).minimum(sizes)
        index, valid = highest_of_each(score.masked_fill(~there, -float("inf")), stay)
        view.memory["score"] = score.gather(1, index)
        front = torch.arange(prefix, device=index.device).expand(len(index), -1)
        if valid is not None:
            valid = torch.cat((torch.ones_like(front, dtype=torch.bool), valid), dim=1)
        return Keep(torch.cat((front, index + prefix), dim=1), valid)

    def _target(self, size: int, tiled: bool) -> int:
        """Patches that stay of each crop of ``size`` patches."""
        if not tiled:
            return self.count(size)
        budget = self.count(_VIEWS * size)
        return min(size, max(1, budget // (_VIEWS if self.llm_layer is None else 2)))

    def select(self, layer: int, view: View) -> Keep:
        """The tokens with the highest score seen from the last prompt token in ``layer``, in sequence order."""
        count = min(len(view.tokens), self.count(view.total))
        keys, values = view.keys(layer)[:, view.index].float(), view.values(layer).float()
        query = view.queries(layer)[:, view.last].float().view(len(keys), -1, keys.shape[-1])  # by key group
        scale = keys.shape[-1] ** -0.5
        visual = values[:, view.index]
        attention = (query @ keys.transpose(-1, -2) * scale).softmax(-1).mean((0, 1))
        alike = (values[:, view.last] @ visual.transpose(-1, -2) * scale).softmax(-1).mean((0, 1))
        return keep(flow_score(attention, alike, visual.mean(0)).topk(count).indices)


def flow_score(attention: torch.Tensor, alike: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Score of each patch: normalised attention plus normalised similarity, times the size of the value (section 3.3).

    Args:
        attention: that [CLS] (or the last prompt token) pays, mean over heads, ``[..., n]``.
        alike: softmax of products of its value with the patches' values, mean over heads, ``[..., n]``.
        values: mean over heads, ``[..., n, d]``.
    """
    share = attention / attention.sum(-1, keepdim=True) + alike / alike.sum(-1, keepdim=True)
    return share * values.abs().sum(-1)


def cut_size(attention: torch.Tensor, sizes: torch.Tensor, target: int, remaining: int) -> torch.Tensor:
    """Patches to drop in a block, not rounded: the more concentrated the attention, the more (section 3.4).

    Args:
        attention: of [CLS], 0 where there is no patch, ``[B, n]``.
        sizes: patches of each sample, ``[B]``.
        target: patches that stay in the end.
        remaining: blocks up to the last cut; 0 = drop all that are too many.

    Returns:
        ``[B]`` float32.
    """
    surplus = (sizes - target).float()
    if not remaining:
        return surplus
    share = attention / attention.sum(-1, keepdim=True)
    concentration = torch.special.entr(share).sum(-1) / sizes.float().log()
    return surplus / remaining**0.5 * (1 - concentration**2)


def _tiles(anatomy: Anatomy) -> bool:
    """Whether the model shows a picture in several crops."""
    return anatomy.vlm is not None and hasattr(anatomy.vlm.config, "image_grid_pinpoints")
