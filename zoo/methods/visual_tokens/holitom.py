"""HoliTom: Holistic Token Merging for Fast Video Large Language Models (arXiv 2505.21334, NeurIPS 2025).

Cut a video into segments so that as many places as possible stay the same from frame to frame. Average such static
places over the segment and cluster them in space; keep the other ones frame by frame, by the attention that the encoder
paid them. Inside the LLM, merge half of what is left into the tokens that the last prompt token attends to most.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity, normalize

from zoo.engines.crops import feature_layer
from zoo.engines.frames import Woven, attention_received, reduce_films, redundant_segments
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Merge, Reduction
from zoo.engines.selection import cluster_dpc_knn
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, in_proportion
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("holitom")
class HoliTom(KeepsShare, VisualTokenReducer):
    """Merges what stays the same in a video before the LLM, and half of the rest inside."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.15,
        gt=0,
        le=1,
        description="Fraction of a video's visual tokens that stays before the LLM, up to rounding in every frame (the "
        "paper's retain ratio); 1 leaves the model as it is.",
    )
    static_threshold: float = Field(
        0.8,
        ge=-1,
        le=1,
        description="Cosine of a place in two neighbouring frames above which it is static (the paper's tau; it takes "
        "0.65 when a tenth is kept).",
    )
    centre_weight: float = Field(
        0.6, ge=0, le=1, description="Weight of a cluster's centre in the merged token (the paper's beta)."
    )
    contextual_ratio: float = Field(
        0.0, ge=0, le=1, description="Share of a frame's changing tokens that is clustered instead of chosen."
    )
    neighbours: int = Field(7, ge=1, description="Neighbours that make the density of a token.")
    longest: int = Field(1024, ge=1, description="Most frames of a segment.")
    inner_layer: int | None = Field(
        None,
        ge=1,
        description="Decoder layer in front of which tokens are merged once more; by default layer 18 of 28, in "
        "proportion.",
    )
    inner_keep_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Fraction of the arriving visual tokens that stays there; 1 = no inner merging.",
    )
    pictures: bool = Field(
        True, description="Reduce still pictures too, as videos of one frame; the release leaves them whole."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, and one inside, which looks at the attention of the layer before."""
        if self.keeps_all:
            return []
        watch = EncoderWatch(feature_layer(anatomy))
        found = [Stage(-1, partial(self.select, anatomy), observes_encoder=(watch,))]
        if self.inner_keep_ratio < 1:
            assert anatomy.decoder is not None
            layer = self.inner_layer or max(1, *in_proportion((18,), len(anatomy.decoder.layers), of=28))
            found.append(Stage(layer, self.merge_inside, observes=(layer - 1,), positions="keep"))
        return found

    def select(self, anatomy: Anatomy, view: View) -> Reduction:
        """Every video on its own; newlines stay where something is left in front of them."""
        share = self.share(len(view.tokens))
        attention = attention_received(view, anatomy, feature_layer(anatomy))
        return reduce_films(
            view,
            lambda film: self.weave(view.tokens[film.tokens], attention[film.tokens], share),
            self.pictures,
        )

    def merge_inside(self, view: View) -> Merge:
        """The visual tokens of one sample in front of ``inner_layer``."""
        attention = view.attention(view.layer - 1, view.last)[:, 0].mean(0)[view.index]
        return pairwise_merge(view.tokens, attention, max(1, round(len(attention) * self.inner_keep_ratio)))

    def weave(self, features: torch.Tensor, attention: torch.Tensor, share: float) -> Woven:
        """What becomes of one video (section 3 of the paper, in the order of the release).

        Args:
            features: visual tokens ``[F, P, D]``.
            attention: received in the encoder, ``[F, P]``.
            share: fraction of all ``F * P`` tokens to keep.

        Returns:
            Places ``[K]`` and weights ``[K, F * P]``: of each segment its static tokens, then those of each frame.
        """
        features = features.float()
        frames, number = attention.shape
        same = cosine_similarity(features[:-1], features[1:], dim=-1) > self.static_threshold
        pieces, reduced = redundant_segments(same, self.longest)
        share = remaining_share(share, frames * number, reduced)
        place: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for start, end in pieces:
            static = (
                same[start:end].all(0) if end > start else torch.zeros_like(attention[0], dtype=torch.bool)
            )
            still, moving = static.nonzero().squeeze(-1), (~static).nonzero().squeeze(-1)
            mean = features[start : end + 1, still].mean(0)
            centres, mix = self.cluster(mean, round(len(still) * share))
            row = features.new_zeros(len(centres), frames, number)
            # An averaged token is an equal part of each frame's.
            row[:, start : end + 1, still] = (mix / (end - start + 1)).unsqueeze(1)
            place.append(start * number + still[centres])
            rows.append(row.flatten(1))
            for frame in range(start, end + 1):
                chosen, mix = self.choose(features[frame, moving], attention[frame, moving], share)
                row = features.new_zeros(len(chosen), frames, number)
                row[:, frame, moving] = mix
                place.append(frame * number + moving[chosen])
                rows.append(row.flatten(1))
        return torch.cat(place), torch.cat(rows)

    def choose(
        self, x: torch.Tensor, attention: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Changing tokens ``x [N, D]`` of one frame: kept ones ``[K]`` in order, and their weights ``[K, N]``."""
        count = ceil(len(x) * share)
        dominant = round(count * (1 - self.contextual_ratio))
        top = attention.topk(dominant).indices.sort().values
        mix = torch.eye(len(x), device=x.device)
        if dominant == count:
            return top, mix[top]
        rest = torch.ones_like(attention, dtype=torch.bool).index_fill(0, top, False).nonzero().squeeze(-1)
        centres, merged = self.cluster(x[rest], count - dominant)
        contextual = mix.new_zeros(len(centres), len(x)).index_copy(1, rest, merged)
        chosen = torch.cat((top, rest[centres]))
        order = chosen.argsort()
        return chosen[order], torch.cat((mix[top], contextual))[order]

    def cluster(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Density-peak clusters of ``x [N, D]``: centres ``[count]`` in order, and weights ``[count, N]``.

        A centre becomes ``beta * centre + (1 - beta) * (mean of the others in its cluster)``.
        """
        if count == 0:
            return torch.zeros(0, dtype=torch.long, device=x.device), x.new_zeros(0, len(x))
        centres, member = cluster_dpc_knn(x, count, min(self.neighbours, count))
        joined = x.new_zeros(count, len(x))
        joined[member, torch.arange(len(x), device=x.device)] = 1.0
        joined[:, centres] = 0.0
        others = joined.sum(1, keepdim=True)
        mix = (1 - self.centre_weight) * joined / others.clamp(min=1)
        numbers = torch.arange(count, device=x.device)
        mix[numbers, centres] = torch.where(others[:, 0] > 0, self.centre_weight, 1.0)
        order = centres.argsort()
        return centres[order], mix[order]


def remaining_share(share: float, tokens: int, reduced: int) -> float:
    """Fraction to keep of what averaging over time leaves, for ``share`` of all ``tokens``; at most 1."""
    return min(share / ((tokens - reduced) / tokens), 1.0)


def pairwise_merge(x: torch.Tensor, attention: torch.Tensor, count: int) -> Merge:
    """Every token joins the most similar one of the ``count`` most attended, by ``(target + token) / 2`` one by one.

    Done in sequence order: a target with ``m`` tokens ends as ``x_0 / 2^m + sum_i t_i / 2^(m - i + 1)``.

    Args:
        x: hidden states ``[N, D]``.
        attention: of the last prompt token, ``[N]``; the ``count`` highest are the targets.
    """
    by_attention = attention.topk(count).indices
    unit = normalize(x.float(), dim=-1)
    target = by_attention[(unit @ unit[by_attention].T).argmax(1)]
    target[by_attention] = by_attention
    kept = by_attention.sort().values
    assignment = torch.searchsorted(kept, target)
    joins = torch.ones_like(assignment).index_fill(0, kept, 0)
    table = torch.nn.functional.one_hot(assignment, count) * joins.unsqueeze(1)
    # How many of its cluster are still to come, the token itself included; for a target: all.
    later = table.flip(0).cumsum(0).flip(0).gather(1, assignment.unsqueeze(1)).squeeze(1)
    exponent = torch.where(joins.bool(), later, table.sum(0)[assignment])
    weight = torch.exp2(-exponent.float())
    return Merge(assignment.unsqueeze(0), weight.unsqueeze(0), kept.unsqueeze(0), normalise=False)
