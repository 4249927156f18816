"""AOT: Token Reduction via Local and Global Contexts Optimization for Efficient Video LLMs (arXiv 2603.01400).

Before the LLM, choose anchors in every frame (some by shallow encoder attention in windows, the others by deep
attention in the whole frame) and move the content of the other tokens into them by optimal transport. Then, clip by
clip, let the anchors of the first frame absorb what the later frames repeat; what those hold anew stays. CVPR 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.crops import distinct_places, feature_layer
from zoo.engines.frames import (
    Film,
    Woven,
    attention_received,
    before_pooling,
    grid_of,
    patch_attention,
    pooling,
    reduce_films,
    windows_of,
)
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Reduction, Replace, Transform
from zoo.engines.selection import local_then_global
from zoo.engines.tokens import Positions, Stage, View
from zoo.engines.transport import absorb_repetition, transport_into_anchors
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, in_proportion
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("aot")
class AOT(KeepsShare, VisualTokenReducer):
    """Moves each frame into anchors, and each clip into those of its first frame, by optimal transport."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.125,
        gt=0,
        le=1,
        description="About the fraction of the visual tokens that stays; it sets the anchors per frame (0.125: the "
        "paper's 126 of 729, for 32 frames).",
    )
    anchors_per_frame: int | None = Field(
        None,
        ge=1,
        description="Anchors of a frame before it is pooled (the paper's visual token number); replaces keep_ratio.",
    )
    global_ratio: float = Field(
        0.5, ge=0, le=1, description="Share of the anchors that deep attention chooses in the whole frame."
    )
    windows: int = Field(
        3,
        ge=1,
        description="Windows on each side of a frame, in which shallow attention chooses the other anchors.",
    )
    shallow_layer: int | None = Field(
        None, description="Encoder layer of the shallow attention; by default layer 5 of 26, in proportion."
    )
    deep_layer: int = Field(-2, description="Encoder layer of the deep attention.")
    between_frames: bool = Field(
        True,
        description="Reduce over time as well; otherwise each frame keeps its anchors (as for LLaVA-Video).",
    )
    new_ratio: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Fraction of the anchors of a clip's later frames, those that match worst, that stays (the paper's "
        "keep ratio).",
    )
    moved_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of tokens of later frames in the anchors that absorb them (the paper's scale).",
    )
    clip: int | None = Field(
        None, ge=1, description="Frames of a clip; by default 4, and 8 for videos of 64 frames or more."
    )
    pictures: bool = Field(
        True, description="Reduce still pictures too, as videos of one frame; the release leaves them whole."
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at two encoder layers (and, if frames are pooled, at its output)."""
        if self.keeps_all and self.anchors_per_frame is None:
            return []
        watches = [EncoderWatch(layer) for layer in self.layers(anatomy)]
        if pooling(anatomy) is not None:
            watches.append(EncoderWatch(feature_layer(anatomy), attention=False, hidden=True))
        return [Stage(-1, partial(self.select, anatomy), observes_encoder=tuple(watches))]

    def layers(self, anatomy: Anatomy) -> tuple[int, int]:
        """The shallow and the deep encoder layer."""
        assert anatomy.encoder is not None
        (shallow,) = in_proportion((5,), len(anatomy.encoder.blocks), of=26)
        return shallow if self.shallow_layer is None else self.shallow_layer, self.deep_layer

    def select(self, anatomy: Anatomy, view: View) -> Reduction:
        """Every video on its own. Where the model pools frames behind the projector, anchors are made before that."""
        share, pool = self.share(len(view.tokens)), pooling(anatomy)
        layers = self.layers(anatomy)
        flat = [image for image in view.images if pool is None or not image.video]
        on_tokens = [attention_received(view, anatomy, layer, flat) for layer in layers]
        tokens, changed = view.tokens.to(torch.float32, copy=True), False

        def become(film: Film) -> Woven:
            nonlocal changed
            patches = before_pooling(anatomy, film)
            if pool is None or patches is None or film.image is None:
                x, grid = tokens[film.tokens], film.grid
                shallow, deep = (attention[film.tokens] for attention in on_tokens)
            else:
                x, grid = patches.float(), grid_of(film.image.patch_coordinates)
                shallow, deep = (patch_attention(film.image, layer) for layer in layers)
            windows = windows_of(grid, self.windows).to(x.device)
            anchors = local_then_global(shallow, deep, windows, *self.budget(len(x), len(windows), share))
            mix = transport_into_anchors(x, anchors, grid)
            if pool is None or patches is None:
                return self.weave(list(mix @ x), list(mix), anchors)
            x[anchors] = (mix @ x).flatten(0, 1)
            frames, weight = pool(x), pool(anchors.float().unsqueeze(-1)).squeeze(-1)
            # A frame whose anchors are too scattered for any of them to survive pooling keeps the best one.
            left = weight >= weight.amax(1, keepdim=True).clamp(max=0.5)
            tokens[film.tokens], changed = frames, True
            unit = torch.eye(left.shape[1], device=left.device)
            return self.weave(
                [x[own] for x, own in zip(frames, left, strict=True)], [unit[own] for own in left], left
            )

        reduction = reduce_films(view, become, self.pictures)
        if not changed:
            return reduction
        assert isinstance(reduction, Transform)
        return Replace(reduction.matrix, reduction.anchor, reduction.apply(tokens.unsqueeze(0)))

    def lengths(self, frames: int) -> list[int]:
        """Frames of each clip; the last one may be shorter."""
        clip = self.clip or (8 if frames >= 64 else 4)
        return [min(clip, frames - start) for start in range(0, frames, clip)]

    def budget(self, frames: int, size: int, share: float) -> tuple[int, int]:
        """Anchors per frame of ``size`` patches, so that about ``share`` of a video stays; and the local ones."""
        # A clip of L frames keeps its first anchors twice (untouched and filled), and some of those of L - 1 frames.
        out = sum(2 + (length - 1) * self.new_ratio if length > 1 else 1 for length in self.lengths(frames))
        wanted = round(share * size * (frames / out if self.between_frames else 1))
        number = min(size, self.anchors_per_frame or max(1, wanted))
        local = int(number * (1 - self.global_ratio))
        if self.anchors_per_frame is None:
            # Windows take equally many; what would be left over goes to the whole frame, so that the share is met.
            local -= local % self.windows**2
        return number, local

    def weave(
        self, anchors: Sequence[torch.Tensor], mixes: Sequence[torch.Tensor], mask: torch.Tensor
    ) -> Woven:
        """What becomes of one video after phase I.

        Args:
            anchors: of each frame, ``[n_f, D]``.
            mixes: what they were made from, ``[n_f, P]``.
            mask: where they stand, ``[F, P]`` bool.

        Returns:
            Places ``[K]`` and weights ``[K, F * P]``: of each clip the anchors of its first frame, what later frames
            hold anew, and the anchors that absorbed the rest. A clip that would grow so keeps just its anchors.
        """
        frames, size = mask.shape
        place, rows, start = [], [], 0
        for length in self.lengths(frames):
            own = slice(start, start + length)
            slots = mask[own].flatten().nonzero().squeeze(-1)
            matrix, stayed = absorb_repetition(anchors[own], self.new_ratio, self.moved_weight)
            number = len(anchors[start])
            if len(matrix) > length * size or not self.between_frames:
                matrix = torch.eye(len(slots), device=mask.device)
                stayed = torch.arange(number, len(slots), device=mask.device)
            first = slots[:number]
            wanted = torch.cat((first, slots[stayed]))
            if len(matrix) > len(wanted):
                # The filled anchors come last: they take the places of the first ones in the last frame, or free ones
                # near the end.
                last = length * size - 1
                wanted = last - distinct_places(
                    last - torch.cat((wanted, first + (length - 1) * size)), last + 1
                )
            row = torch.zeros(len(matrix), frames, size, device=mask.device)
            parts = matrix.split([len(mix) for mix in mixes[own]], dim=1)
            row[:, own] = torch.stack(
                [part @ mix for part, mix in zip(parts, mixes[own], strict=True)], dim=1
            )
            place.append(start * size + wanted)
            rows.append(row.flatten(1))
            start += length
        return torch.cat(place), torch.cat(rows)
