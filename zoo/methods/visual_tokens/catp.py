"""CATP: Contextually Adaptive Token Pruning for multimodal in-context learning (arXiv 2508.07871, AAAI 2026).

For prompts of several demonstrations and a query, each a picture and its text. Before the LLM every picture keeps the
tokens that cover it and resemble its text (greedy facility location). Behind two neighbouring decoder layers, first the
tokens of all demonstrations are ranked together, by the growth of the last token's attention and likeness to the query;
then those of the query picture, by likeness to the context that is left.
"""

from __future__ import annotations

from math import floor
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.reductions import Keep
from zoo.engines.selection import most_covering, unit_rows
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("catp")
class CATP(VisualTokenReducer):
    """Prunes demonstrations and query picture with regard to each other."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(
        1 / 3,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays from layer `layer` + 2 on (1 - the paper's R); half of "
        "the others leave before the LLM.",
    )
    layer: int = Field(
        6,
        ge=1,
        description="Decoder layer behind which the demonstrations are pruned (the paper's K), counted from 0; the "
        "query picture is pruned behind the next one.",
    )
    text_weight: float = Field(
        0.7,
        ge=0,
        description="Weight of the likeness to the paired text before the LLM (the paper's lambda_1).",
    )
    query_weight: float = Field(
        0.6,
        ge=0,
        description="Weight of the likeness to the query among demonstrations (the paper's lambda_2).",
    )
    normalise: bool = Field(
        False,
        description="Divide attention growth by its largest value, so that it counts beside cosines; not in the paper.",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """Before the LLM, behind layer K, and behind layer K + 1."""
        if self.keep_ratio == 1:
            return []
        behind = self.layer + 1
        return [
            Stage(-1, self.cover),
            Stage(behind, self.prune_demonstrations, observes=(self.layer - 1, self.layer)),
            Stage(behind + 1, self.prune_query),
        ]

    def cover(self, view: View) -> Keep:
        """Stage 1: what stays of each picture of one sample."""
        pictures = [image.tokens for image in view.images]
        starts = [int(view.index[tokens].min()) for tokens in pictures]
        # Later stages find the query by the number of text tokens in front of it: text never leaves.
        view.memory["catp.demonstrations"] = (
            int((view.text_index < starts[0]).sum()),
            int((view.text_index < starts[-1]).sum()),
        )
        kept = []
        for tokens, start, end in zip(pictures, starts, [*starts[1:], None], strict=True):
            paired = view.text_index > start
            if end is not None:
                paired &= view.text_index < end
            count = max(1, floor(len(tokens) * (1 + self.keep_ratio) / 2))
            kept.append(tokens[self.covering(view.tokens[tokens], view.text[paired], count)])
        return keep(torch.cat(kept))

    def covering(self, x: torch.Tensor, text: torch.Tensor, count: int) -> torch.Tensor:
        """Greedy picks that maximise coverage of a picture plus likeness to its text.

        With ``s = (cos + 1) / 2`` the objective is ``sum_x max_y s(x, y) + lambda_1 sum_y s(y, v)``, ``v`` the mean of
        the text. Its gains are halves of those with plain cosines, a coverage that starts at -1, and
        ``lambda_1 (cos(y, v) + 1)``, which is how they are computed here.

        Args:
            x: tokens of one picture ``[N, D]``.
            text: embeddings of its text ``[T, D]``; empty = coverage alone decides.
            count: number of picks.

        Returns:
            Indices in the order of picking, ``[count]``. Ties go to the smaller index.
        """
        if not len(text):
            text = torch.zeros_like(x[:1])
        likeness = unit_rows(x) @ unit_rows(text.float().mean(0, keepdim=True))[0]
        return most_covering(x, self.text_weight * (likeness + 1), count, multiply=False, floor=-1.0)

    def prune_demonstrations(self, view: View) -> Keep:
        """Stage 2, behind layer K: the demonstrations' tokens, ranked together; the query picture stays whole."""
        *demonstrations, query = view.images
        if not demonstrations:
            return keep(query.tokens)
        tokens = torch.cat([image.tokens for image in demonstrations])
        _, before = view.memory["catp.demonstrations"]
        asked = torch.cat((view.tokens[query.tokens], view.text[before:])).float().mean(0)
        last, places = view.last, view.index[tokens]
        earlier, later = (view.attention(layer, last)[:, 0].mean(0) for layer in (self.layer - 1, self.layer))
        scores = self.context_scores(later[places] - earlier[places], view.tokens[tokens], asked)
        whole = sum(image.packed.length for image in demonstrations)
        count = min(floor(self.keep_ratio * whole), len(tokens))
        return keep(torch.cat((tokens[scores.topk(count).indices], query.tokens)))

    def context_scores(self, growth: torch.Tensor, x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Attention growth, at least 0, plus ``lambda_2`` times the cosine to the query.

        Args:
            growth: attention of the last prompt token in layer K minus that in layer K - 1, mean over heads, ``[N]``.
            x: hidden states behind layer K, ``[N, D]``.
            query: mean hidden state of the query sample, ``[D]``.

        Returns:
            ``[N]`` float32.
        """
        growth = growth.float().clamp(min=0)
        if self.normalise:
            growth = growth / growth.max().clamp(min=torch.finfo(growth.dtype).tiny)
        return growth + self.query_weight * (unit_rows(x) @ unit_rows(query[None])[0])

    def prune_query(self, view: View) -> Keep:
        """Stage 2, behind layer K + 1: the query picture's tokens that resemble the context most."""
        *demonstrations, query = view.images
        start, before = view.memory["catp.demonstrations"]
        staying = torch.cat([query.tokens[:0], *(image.tokens for image in demonstrations)])
        # A query without demonstrations has its own text for a context.
        text = view.text[start:before] if demonstrations else view.text[before:]
        if not len(text) + len(staying):
            text = view.text
        context = torch.cat((view.tokens[staying], text)).float().mean(0)
        scores = unit_rows(view.tokens[query.tokens]) @ unit_rows(context[None])[0]
        count = max(1, floor(self.keep_ratio * query.packed.length))
        best = scores.topk(min(count, len(scores))).indices
        return keep(torch.cat((staying, query.tokens[best])))
