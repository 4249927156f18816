"""DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (arXiv 2411.15024, CVPR 2025).

Before the LLM (token temporal merging), the second frame of every pair keeps the tokens least like the same places of
the first, and in windows of four the third keeps those least like the first. While decoding, the attention of an early
layer picks at each step the visual keys that deeper layers read; the others stay cached and may come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity

from zoo.engines.frames import films_of, outside_of, standing
from zoo.engines.key_reads import KeyReads
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, TokenReducer, View
from zoo.errors import Refused
from zoo.families.visual_tokens import AppliedTokens, VisualTokenReducer
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy
from zoo.report import Report


@register("dycoke")
class DyCoke(VisualTokenReducer):
    """Drops tokens that repeat an earlier frame, and reads few visual keys per decode step."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Fraction of the tokens of a compared frame that stays (1 - the paper's K). Three of four frames "
        "are compared: about (1 + 3 * keep_ratio) / 4 of a long video stays.",
    )
    order: Literal["similarity", "raster"] = Field(
        "similarity",
        description="Order of a compared frame's tokens: least similar first, as in the release, or as in the grid.",
    )
    read_ratio: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Fraction of the cached visual keys that layers from `layer` on read in a decode step (1 - the "
        "paper's P); 1 = all.",
    )
    layer: int = Field(
        3,
        ge=1,
        description="First decoder layer that reads few keys (the paper's L), counted from 0; the one in front of it "
        "chooses.",
    )
    gate: float = Field(
        0.9, description="Cosine to the attention of the step before from which on nothing is chosen anew."
    )
    stable: Literal["read-all", "reuse"] = Field(
        "read-all",
        description="What such a step reads: all keys, as in the release, or the previous choice, as in the paper.",
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse text-only models and those with no layer to read less."""
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        depth = 0 if decoder is None else len(decoder.layers)
        if self.read_ratio < 1 and self.layer >= depth:
            raise refuse(
                self, f"a decoder layer {self.layer} (or a smaller `layer`)", f"layers 0..{depth - 1}"
            )

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedTokens:
        """Hook ``loaded``: what shortens the prompt, then what decode steps read."""
        if self.read_ratio == 1:
            return super().apply(loaded, **resources)
        self.check(loaded)
        reads = KeyReads(partial(Gate, self.read_ratio, self.gate, self.stable == "reuse"))
        stage = Stage(-1, partial(self.select, reads))
        reducer = TokenReducer(loaded.anatomy, [stage], self.positions, self.slug)
        return AppliedDyCoke(self, loaded, reducer, reads)

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM; refused with a choice of keys while decoding, which only ``apply`` installs."""
        if self.read_ratio < 1:
            raise Refused(
                "dycoke picks visual keys while decoding, which other visual-token methods would move: set "
                "dycoke.read_ratio=1 in a stack"
            )
        return [] if self.keep_ratio == 1 else [Stage(-1, partial(self.select, None))]

    def kept_of_frame(self, tokens: int) -> int:
        """Tokens that a compared frame of ``tokens`` keeps, rounded down."""
        return int(self.keep_ratio * tokens)

    def select(self, reads: KeyReads | None, view: View) -> Keep:
        """The kept tokens of one sample: frames in the order of time; all of stills and newlines."""
        films = [film.tokens for film in films_of(view)]
        kept = [outside_of(len(view.tokens), films, view.index.device)]
        keys = [kept[0]]
        for film in films:
            picks = torch.arange(film.numel(), device=film.device)
            if len(film) > 1 and self.keep_ratio < 1:
                picks = temporal_order(view.tokens[film], self.kept_of_frame(film.shape[1]))
                if self.order == "raster":
                    picks = picks.sort().values
            kept.append(film.flatten()[picks])
            keys.append(standing(film, picks))
        index = torch.cat(kept)[torch.cat(keys).argsort(stable=True)]
        if reads is not None:
            # The release counts its block of visual keys before the newline joins it, and one short.
            candidates = torch.arange(len(index), device=index.device) < len(index) - 2
            reads.note(view, index, candidates)
        return Keep(index.unsqueeze(0))


def temporal_order(x: torch.Tensor, kept: int) -> torch.Tensor:
    """Token temporal merging: which tokens stay, frame by frame, the least similar of a compared frame first.

    Of an odd number of frames the last one is lost, and no third frame is compared from ``F - 4`` on, as in the
    release.

    Args:
        x: tokens of a video ``[F, P, D]``.
        kept: tokens that a compared frame keeps.

    Returns:
        Numbers ``frame * P + p``, ``[T]``.
    """
    frames, places = x.shape[:2]
    x = x.float()
    numbers = torch.arange(frames * places, device=x.device).view(frames, places)
    picks = list(numbers[: frames - frames % 2])
    compared = [(first, first + 1) for first in range(0, frames - 1, 2)]
    compared += [(first, first + 2) for first in range(0, frames - 4, 4)]
    for first, second in compared:
        similarity = cosine_similarity(x[first], x[second], dim=1)
        picks[second] = second * places + similarity.topk(kept, largest=False).indices
    return torch.cat([numbers[0, :0], *picks])


@dataclass
class Gate:
    """Decides, step by step, which visual keys of one sample are read.

    Attributes:
        read_ratio: share of the keys that is read, rounded down.
        threshold: cosine to the last step's attention from which on nothing is chosen anew.
        reuse: read the previous choice then, instead of all keys.
        similarity: that cosine in the latest step; 0 in the first.
    """

    read_ratio: float
    threshold: float = 0.9
    reuse: bool = False
    similarity: float = 0.0
    _last: torch.Tensor | None = None
    _read: torch.Tensor | None = None

    def __call__(self, scores: torch.Tensor) -> torch.Tensor | None:
        """From the attention to each key, mean over heads ``[I]``, to the keys read, ``[I]`` bool; ``None`` = all."""
        last, self._last = self._last, scores
        self.similarity = 0.0 if last is None else float(cosine_similarity(scores, last, dim=0))
        if last is not None and self.similarity >= self.threshold:
            return self._read if self.reuse else None
        best = scores.topk(int(len(scores) * self.read_ratio)).indices
        self._read = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, best, True)
        return self._read


class AppliedDyCoke(AppliedTokens):
    """DyCoke at work, with the choice of keys while decoding."""

    def __init__(self, method: DyCoke, loaded: LoadedModel, reducer: TokenReducer, reads: KeyReads) -> None:
        super().__init__(method, loaded, reducer)
        self._reads = reads
        try:
            reads.install(reducer.decoder, method.layer)
        except BaseException:
            super().close()
            raise

    @property
    def report(self) -> Report:
        """As of any token method, and how many keys decode steps passed over."""
        report = super().report
        if self._reads.steps:
            mean = round(self._reads.passed_over / self._reads.steps, 2)
            report.facts["visual keys passed over per decode step (deep layers)"] = mean
        return report

    def close(self) -> None:
        """Let all layers read everything, then undo the rest."""
        self._reads.close()
        super().close()
