"""SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (arXiv 2410.04417, ICML 2025).

Text tokens that match the picture (*raters*) are chosen once, from the input embeddings. Behind three decoder layers
the visual tokens are ranked by the attention of the raters; the best stay. The best of the others are recycled: they
are clustered, and each cluster goes on as the mean of its members, behind the tokens that stay.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from zoo.engines.reductions import Merge
from zoo.engines.selection import cluster_dpc_knn, rows_of_question
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import VisualTokenReducer, in_proportion
from zoo.interface import register
from zoo.models.anatomy import Anatomy

LAYERS = (2, 6, 15)
TOKENS = 576
TABLES = {
    0: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    576: (576,) * 3,
}
"""Tokens that stay behind each of the three layers of LLaVA-1.5 (576 visual tokens), by the budget's name; the release
has those from 64 to 192."""


@register("sparsevlm")
class SparseVLM(VisualTokenReducer):
    """Keeps what raters of the question look at, and means of what comes next."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        1 / 3,
        gt=0,
        le=1,
        description="Fraction of the visual tokens kept, as a mean over the decoder layers: 1/3 is the release's "
        "budget of 192 of 576; between its tables (192, 128, 96, 64) counts are interpolated.",
    )
    counts: tuple[int, ...] | None = Field(
        None,
        description="Tokens that stay behind each of `layers`, recycled ones not counted; replaces keep_ratio.",
    )
    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="Decoder layers, counted from 0, whose attention ranks. None = 2, 6, 15 of 32, in proportion.",
    )
    recycle_ratio: float = Field(
        0.3, ge=0, le=1, description="Fraction of the tokens that do not stay which is recycled."
    )
    cluster_size: int = Field(10, ge=1, description="Recycled tokens per cluster.")

    @model_validator(mode="after")
    def _one_count_per_layer(self) -> SparseVLM:
        layers = LAYERS if self.layers is None else self.layers
        if min(layers) < 0 or list(layers) != sorted(set(layers)):
            raise ValueError("layers must be at least 0 and ascend")
        if self.counts is None and len(layers) != len(LAYERS):
            raise ValueError(
                f"keep_ratio speaks of {len(LAYERS)} layers: give counts for {len(layers)} layers"
            )
        if self.counts is not None and (len(self.counts) != len(layers) or min(self.counts) < 0):
            raise ValueError(f"counts needs one number for each of {len(layers)} layers")
        return self

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage behind each of ``layers``; the first one also looks at what enters the decoder."""
        if self.keep_ratio == 1 and self.counts is None:
            return []
        assert anatomy.decoder is not None
        layers = self.layers
        if layers is None:
            layers = in_proportion(LAYERS, len(anatomy.decoder.layers))
        # Places in an image grid cannot be counted anew.
        in_place = anatomy.decoder.grid_positions
        return [
            Stage(
                layer + 1,
                partial(self.select, number, in_place),
                observes=(layer,),
                observes_hidden=() if number else ((0, "input"),),
            )
            for number, layer in enumerate(layers)
        ]

    def select(self, number: int, in_place: bool, view: View) -> Merge:
        """Stage ``number`` of one sample: the tokens that stay, in sequence order, then the recycled ones.

        ``in_place``: a recycled token stands where its cluster's centre stood instead.
        """
        question = rows_of_question(view.text_index, view.index)
        if number == 0:
            embeddings = view.hidden(0, "input")
            view.memory["raters"] = raters(embeddings[view.index], embeddings[question])
        rows = question[view.memory["raters"]]
        scores = (view.received(view.layer - 1, rows).mean(0) / len(rows))[view.index]
        assignment, anchor = self.cluster(view.tokens, scores, self.count(number, view.total))
        # Pictures stay apart: a recycled token follows those of the picture that its centre is from.
        picture = (view.index.diff(prepend=view.index[:1]) != 1).cumsum(0)
        order = (anchor if in_place else picture[anchor]).argsort(stable=True)
        assignment = torch.where(assignment < 0, -1, order.argsort()[assignment])
        # Positions are counted anew: places only have to ascend, so that attention stays causal.
        return Merge(
            assignment.unsqueeze(0), torch.ones_like(scores).unsqueeze(0), anchor.sort().values.unsqueeze(0)
        )

    def count(self, number: int, total: int) -> int:
        """Tokens that stay behind stage ``number`` for an input of ``total`` visual tokens."""
        if self.counts is not None:
            return self.counts[number]
        budget = self.keep_ratio * TOKENS
        low, high = next(pair for pair in pairwise(TABLES) if budget <= pair[1])
        share = (budget - low) / (high - low)
        tokens = TABLES[low][number] * (1 - share) + TABLES[high][number] * share
        return round(tokens * total / TOKENS)

    def cluster(
        self, tokens: torch.Tensor, scores: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``count`` of ``tokens [N, D]`` by ``scores [N]`` (at most ``N - 1``) and recycle some of the others.

        Returns:
            The new token that each token goes into ``[N]`` (-1 = none), and the token that each new one is or is
            centred at ``[K]``: first those that stay, in sequence order, then the clusters.
        """
        size = len(tokens)
        count = min(count, size - 1)
        ranked = scores.topk(size).indices
        kept, rest = ranked[:count].sort().values, ranked[count:]
        recycled = rest[: int(self.recycle_ratio * len(rest)) + 1]
        clusters = int(len(recycled) / self.cluster_size) + 1
        centres, member = cluster_dpc_knn(tokens[recycled], clusters, clusters)
        assignment = torch.full_like(ranked, -1)
        assignment[kept] = torch.arange(count, device=ranked.device)
        assignment[recycled] = count + member
        return assignment, torch.cat((kept, recycled[centres]))


def raters(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Text tokens that match the picture more than text does on average, ``[R]``; all of them if none stands out.

    Args:
        image: input embeddings of the visual tokens ``[N, D]``.
        text: input embeddings of the question ``[T, D]``.
    """
    relevance = (image.float() @ text.float().T).softmax(-1).mean(0)
    chosen = (relevance > relevance.mean()).nonzero().squeeze(-1)
    return chosen if len(chosen) else torch.arange(len(text), device=text.device)
