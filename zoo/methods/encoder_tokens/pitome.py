"""PiToMe: Accelerating Transformers with Spectrum-Preserving Token Merging (arXiv 2405.16148, NeurIPS 2024).

In every block, between attention and MLP, an energy says how large the group of similar tokens around each token is.
Tokens of high energy are redundant and merge; isolated ones are protected. Partners are chosen by rank of energy, not
by parity of position. No training is needed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import elu, normalize

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.reductions import Join
from zoo.families.encoder_tokens import EncoderTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Encoder

Rule = Literal["ordered", "bipartite", "text"]
MARGINS = {"deit": 0.75, "clip_vision_model": 0.95, "siglip_vision_model": 0.95}
"""Margin of the first block by architecture; 0.9, as for ViTs trained on ImageNet-21k, elsewhere."""


@register("pitome")
class PiToMe(EncoderTokenReducer):
    """Keeps ``n - floor(n - n * keep_ratio)`` of the ``n`` patches in each block.

    [CLS], distillation token and registers neither go nor receive others. Sizes weigh the means, but attention is not
    told about them (the release never passes them on).
    """

    counts_sizes: ClassVar[bool] = True

    keep_ratio: float = Field(0.925, ge=0.5, le=1, description="Fraction of the patches kept in each block.")
    margin: float | None = Field(
        None,
        description="Cosine from which on two tokens count as alike, in the first block; falls to 0 behind the last. "
        "None = 0.75 for DeiT, 0.95 for CLIP and SigLIP, 0.9 elsewhere.",
    )
    first: Rule = Field(
        "bipartite",
        description="Rule of the first half of the blocks: 'bipartite' merges the best pairs between even and odd "
        "ranks of energy, 'ordered' the tokens of highest energy, 'text' those too, ranked and halved as the release "
        "does for text encoders.",
    )
    second: Rule = Field(
        "ordered",
        description="Rule of the other blocks. (MAE models: first='ordered', second='bipartite'.)",
    )

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Between the halves of every block."""
        if self.keep_ratio == 1:
            return []
        depth, start = len(encoder.blocks), self._margin(encoder)
        return [
            BlockStage(
                block,
                partial(
                    self.merge,
                    margin=start * (1 - block / depth),
                    rule=self.first if block < math.ceil(depth / 2) else self.second,
                ),
                observes=True,
            )
            for block in range(depth)
        ]

    def _margin(self, encoder: Encoder) -> float:
        return MARGINS.get(encoder.config.model_type, 0.9) if self.margin is None else self.margin

    def merge(self, view: BlockView, margin: float, rule: Rule) -> Join | None:
        """Means of tokens of high energy, weighted with their sizes."""
        patches = view.tokens.shape[1] - view.prefix
        r = math.floor(patches - patches * self.keep_ratio)
        if r == 0:
            return None
        weight = view.sizes if view.merged and rule != "text" else None
        if view.valid is not None:
            # Padding weighs next to nothing: not zero, so that padding may merge with padding.
            weight = view.sizes.clamp(min=1e-6)
        return energy_matching(view.mean_key, r, margin, rule, view.prefix, weight, view.valid)

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """The margin that was used, and the rules."""
        return {
            "margin of the first block": self._margin(reducer.encoder),
            "rules": f"{self.first}, then {self.second}",
        }


def energies(
    likeness: torch.Tensor, margin: float, rule: Rule, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over all tokens, itself included, of what counts as alike: ``[B, n]``.

    ``ELU(cosine - margin)``; for text a Gaussian around 1 of width ``1 - margin``.

    Args:
        likeness: cosines, ``[B, n, n]``.
        margin: see :class:`PiToMe`.
        rule: see :class:`PiToMe`.
        valid: ``[B, n]`` bool; padding (``False``) is not counted, and has the lowest energy.
    """
    if rule == "text":
        width = 1 - margin
        alike = (-0.5 * ((1 - likeness) / width).square()).exp() / (width * math.sqrt(2 * math.pi))
    else:
        alike = elu(likeness - margin)
    if valid is None:
        return alike.mean(-1)
    mean = (alike * valid.unsqueeze(1)).sum(-1) / valid.sum(-1, keepdim=True)
    return mean.masked_fill(~valid, -torch.inf)


def energy_matching(
    metric: torch.Tensor,
    r: int,
    margin: float,
    rule: Rule,
    prefix: int = 0,
    weight: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> Join:
    """Merge ``r`` tokens of high energy, each into the most similar of its partners.

    The output begins with the prefix. Then come the other tokens that nobody joins (``ordered`` and ``text``: by
    falling energy; ``bipartite``: by falling similarity to their best partner), then the partners by falling energy.

    Args:
        metric: features that are compared by their cosine, ``[B, N, C]``.
        r: tokens to remove, at most half of those behind the prefix.
        margin: see :class:`PiToMe`.
        rule: how tokens are split into those that may go and their partners, by rank of energy. ``ordered``: even and
            odd ranks of the first ``2r``; ``text``: their first and second half; ``bipartite``: even and odd ranks of
            all tokens, of which the ``r`` closest pairs merge.
        prefix: tokens at the beginning that neither go nor receive others.
        weight: token sizes ``[B, N]`` for the means; ``None`` = every token counts as one.
        valid: ``[B, N]`` bool; padding (``False``) has the lowest energy.
    """
    feature = normalize(metric[:, prefix:].detach().float(), dim=-1)
    likeness = feature @ feature.transpose(1, 2)
    there = None if valid is None else valid[:, prefix:]
    order = energies(likeness, margin, rule, there).argsort(1, descending=True)
    if there is not None:
        likeness = likeness.masked_fill(~(there.unsqueeze(1) & there.unsqueeze(2)), -torch.inf)
    if rule == "bipartite":
        goes, partners, protected = order[:, ::2], order[:, 1::2], order[:, :0]
    elif rule == "ordered":
        goes, partners, protected = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    else:
        goes, partners, protected = order[:, :r], order[:, r : 2 * r], order[:, 2 * r :]
    rows = likeness.gather(1, goes.unsqueeze(-1).expand(-1, -1, likeness.shape[-1]))
    best, partner = rows.gather(2, partners.unsqueeze(1).expand(-1, goes.shape[1], -1)).max(-1)
    if rule == "bipartite":
        closest = best.argsort(1, descending=True)
        goes, partner = goes.gather(1, closest), partner.gather(1, closest)
        protected = goes[:, r:]
    kept = torch.cat((protected, partners), dim=1) + prefix
    head = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
    target = partner[:, :r] + prefix + protected.shape[1]
    return Join(torch.cat((head, kept), dim=1), goes[:, :r] + prefix, target, metric.shape[1], weight)
