"""FastVID: Dynamic Density Pruning for Fast Video Large Language Models (arXiv 2503.11187, NeurIPS 2025).

Cut a video where neighbouring frames differ. In every frame, keep the tokens that the encoder attends to most; merge
the others of a segment into density peaks, which stand on every few frames of it. The question is not looked at.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity, normalize

from zoo.engines.crops import class_attention, feature_layer
from zoo.engines.frames import Film, Woven, attention_received, reduce_films
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Reduction
from zoo.engines.selection import density_peaks
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("fastvid")
class FastVID(KeepsShare, VisualTokenReducer):
    """Keeps salient tokens of every frame, and anchors into which all others of a segment are merged."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays: int(keep_ratio * P) per frame on average, or slightly "
        "fewer (the paper's retention ratio).",
    )
    context_ratio: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of the budget for merged anchors (the paper's d); the rest is salient.",
    )
    segments: int = Field(8, ge=1, description="Least number of segments (the paper's c).")
    threshold: float = Field(
        0.9,
        ge=-1,
        le=1,
        description="Cosine of neighbouring frames below which the video is cut (the paper's tau).",
    )
    stride: int = Field(4, ge=1, description="Every how many frames anchors stand (the paper's p).")
    anchor_weight: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Least weight of an anchor's own token in the merged one (the paper's beta).",
    )
    neighbours: int = Field(4, ge=1, description="Neighbours that make the density of a token.")
    pictures: bool = Field(
        True, description="Reduce still pictures too, as videos of one frame; the release leaves them whole."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at the encoder layer that feeds the projector."""
        if self.keeps_all:
            return []
        watch = EncoderWatch(feature_layer(anatomy))
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=(watch,))]

    def select(self, anatomy: Anatomy, view: View) -> Reduction:
        """Every video on its own.

        The paper asks the pooling head of SigLIP, which transformers' models do not have. ``[CLS]``, or the attention
        received from all patches, takes the place of its query; the mean of a frame's tokens under that attention
        takes the place of its output.
        """
        assert anatomy.encoder is not None
        look = class_attention if anatomy.encoder.has_cls else attention_received
        attention = look(view, anatomy, feature_layer(anatomy))
        share = self.share(len(view.tokens))

        def become(film: Film) -> Woven:
            features, weight = view.tokens[film.tokens].float(), attention[film.tokens]
            frames = (weight.unsqueeze(1) @ features).squeeze(1)
            return self.weave(features, self.lengths(frames), weight, share)

        return reduce_films(view, become, self.pictures)

    def lengths(self, frames: torch.Tensor) -> list[int]:
        """Frames of each segment: cut at the ``c - 1`` least similar neighbours and wherever they fall below tau.

        Args:
            frames: a feature of each frame, ``[F, E]``.
        """
        similarity = cosine_similarity(frames[:-1].float(), frames[1:].float(), dim=-1)
        cuts = similarity < self.threshold
        cuts[similarity.topk(min(self.segments - 1, len(cuts)), largest=False).indices] = True
        ends = [*cuts.nonzero().squeeze(-1).tolist(), len(frames) - 1]
        return [end - before for before, end in zip([-1, *ends], ends, strict=False)]

    def budgets(self, tokens: int, share: float) -> tuple[int, int]:
        """Salient tokens and context tokens of a frame of ``tokens``."""
        both = max(1, int(tokens * share))
        context = int(both * self.context_ratio)
        return both - context, context

    def contexts(self, lengths: list[int], context: int) -> list[int]:
        """Anchors of each frame: those of a segment stand on its last frame and every ``stride``-th before it."""
        counts: list[int] = []
        for length in lengths:
            each = context * length // -(-length // self.stride)
            counts += [0 if (length - 1 - frame) % self.stride else each for frame in range(length)]
        return counts

    def weave(
        self, features: torch.Tensor, lengths: list[int], attention: torch.Tensor, share: float
    ) -> Woven:
        """What becomes of one video.

        Args:
            features: visual tokens ``[F, P, D]``.
            lengths: frames of each segment.
            attention: salience ``[F, P]``.
            share: fraction of the tokens of a frame that stays.

        Returns:
            Places ``[K]``, ascending, and weights ``[K, F * P]``.
        """
        frames, number = attention.shape
        salient, context = self.budgets(number, share)
        top = attention.topk(salient).indices
        others = torch.ones_like(attention, dtype=torch.bool).scatter(1, top, False).nonzero()[:, 1]
        others = others.view(frames, number - salient)
        others = others + torch.arange(frames, device=features.device).unsqueeze(1) * number
        top = top + torch.arange(frames, device=features.device).unsqueeze(1) * number
        flat = features.float().flatten(0, 1)
        score = self.density(flat[others])
        place = [top.flatten()]
        rows = [flat.new_zeros(top.numel(), len(flat)).scatter(1, top.view(-1, 1), 1.0)]
        counts, first = self.contexts(lengths, context), 0
        for length in lengths:
            for frame in range(first, first + length):
                # As in the release, a frame with a budget of just n_c, such as a segment of one frame, merges alone.
                begin, end = (frame, frame + 1) if counts[frame] == context else (first, first + length)
                members = others[begin:end].flatten()
                peaks = score[frame].topk(min(counts[frame], number - salient)).indices
                peaks = peaks + (frame - begin) * (number - salient)
                if len(peaks):
                    place.append(members[peaks])
                    mix = self.merge(flat[members], peaks)
                    rows.append(flat.new_zeros(len(peaks), len(flat)).index_copy(1, members, mix))
            first += length
        anchor = torch.cat(place)
        order = anchor.argsort()
        return anchor[order], torch.cat(rows)[order]

    def density(self, x: torch.Tensor) -> torch.Tensor:
        """How well each token of a frame serves as an anchor, ``[F, N]``, of ``x [F, N, D]``."""
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[:2])
        distances = torch.cdist(x, x) / x.shape[-1] ** 0.5
        return density_peaks(distances, min(self.neighbours, x.shape[1]))

    def merge(self, x: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Every token joins the anchor of highest cosine: ``w * anchor + (1 - w) * mean``, ``w = max(beta, 1/(m+1))``.

        Args:
            x: tokens ``[N, D]``.
            anchors: which of them are anchors, ``[A]``; each is among the ``m`` tokens that join it.

        Returns:
            Weights ``[A, N]``.
        """
        unit = normalize(x, dim=-1)
        member = (unit @ unit[anchors].T).argmax(-1)
        mix = x.new_zeros(len(anchors), len(x))
        mix[member, torch.arange(len(x), device=x.device)] = 1.0
        joined = mix.sum(1, keepdim=True)
        own = (1 / (joined + 1)).clamp(min=self.anchor_weight)
        return ((1 - own) * mix / joined.clamp(min=1)).scatter_add(1, anchors.unsqueeze(1), own)
