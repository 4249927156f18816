"""Visual tokens that leave the sequence for a few layers and come back.

Everywhere else a sequence only gets shorter from layer to layer. Here a :class:`Scatter` stage puts all visual tokens
of the sample back at their places, so what was made once for all decoder layers (mask, rotary embedding) and cut for
the short sequence is made anew for the long one. Tokens that come back have no keys in the layers that ran without
them: each layer's cache holds what the layer saw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from zoo.engines.reductions import Keep, Replace
from zoo.engines.segments import Segment, causal_mask, gather_last, positions_of, visible
from zoo.engines.tokens import Pass, TokenReducer
from zoo.engines.views import Stage, View


@dataclass(frozen=True)
class Scatter(Stage):
    """A stage at which all visual tokens of a sample stand in the sequence again.

    ``reduce`` returns a :class:`Replace` whose ``values [1, total, D]`` are those of all visual tokens the sample
    began with, in their order. At most one such stage, with positions kept, and behind one before the LLM.
    """


class ScatterReducer(TokenReducer):
    """A :class:`TokenReducer` one of whose stages is a :class:`Scatter`. Layers with sliding windows see everything."""

    _parked: list[torch.Tensor]
    """Visual features still to be added layer by layer (DeepStack), at full length, of the running input."""

    def _take_deep_features(self, current: Pass, kwargs: dict[str, Any], visual: torch.Tensor) -> None:
        super()._take_deep_features(current, kwargs, visual)
        self._parked = list(current.deep)

    def _shorten(self, current: Pass, stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
        if not isinstance(stage, Scatter):
            return super()._shorten(current, stage, hidden)
        before, whole = current.segments[-1], current.segments[0]
        parked, self._parked = self._parked, []
        self.arriving[stage.layer] = before.visual.sum(1).tolist()
        self.kept[stage.layer] = [
            columns[own] for columns, own in zip(whole.columns, whole.visual, strict=True)
        ]
        assert self.visual_per_layer is not None
        self.visual_per_layer[:, stage.layer :] = whole.visual.sum(1, keepdim=True)
        if before is whole:
            return hidden
        full = hidden.new_zeros(len(hidden), current.length, hidden.shape[-1])
        for sample, row in enumerate(full):
            valid = before.valid[sample]
            row[before.columns[sample, valid]] = hidden[sample, valid]
            if bool(whole.visual[sample].any()):
                view = self._before_return(current, stage, hidden, sample)
                made = stage.reduce(view)
                assert isinstance(made, Replace)
                row[whole.visual[sample]] = made.values[0].to(row.dtype)
                if self.watch is not None:
                    self.watch(*_after_return(view, whole, sample, made.values[0]))
        current.segments.append(replace(whole, first=stage.layer, step={}))
        current.deep = parked
        return full

    def _before_return(self, current: Pass, stage: Stage, hidden: torch.Tensor, sample: int) -> View:
        """What is left of one sample, without anything observed."""
        before, whole = current.segments[-1], current.segments[0]
        places = before.visual[sample].nonzero().squeeze(-1)
        others = (before.valid[sample] & ~before.visual[sample]).nonzero().squeeze(-1)
        original = before.columns[sample, places]
        return View(
            tokens=hidden[sample, places],
            index=places,
            original=original,
            ordinal=(whole.visual[sample].long().cumsum(0) - 1)[original],
            text=hidden[sample, others],
            text_index=others,
            total=int(whole.visual[sample].sum()),
            layer=stage.layer,
            seed=stage.seed,
            memory=current.memory[sample],
            _sample=sample,
        )

    def _cut(
        self,
        current: Pass,
        segment: Segment,
        keys: int,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        positions: torch.Tensor | None,
    ) -> dict[str, Any]:
        back = next(stage.layer for stage in self.stages if isinstance(stage, Scatter))
        if segment.first < back:
            return super()._cut(current, segment, keys, hidden, mask, rotary, positions)
        result: dict[str, Any] = {"attention_mask": self._full_mask(segment, keys, hidden, mask)}
        if current.prefill:
            given = current.given_positions
            own = in_text = positions_of(segment, given)
            if given is not None and own.dim() == 3:
                # M-RoPE models have the place in the text in front.
                in_text = gather_last(given, segment.columns)[0]
        elif segment.inside and positions is not None:
            own = in_text = positions - segment.shift.view(-1, 1)
        else:  # new tokens stand where the decoder says
            return {**result, "position_ids": positions, "position_embeddings": rotary}
        if rotary is not None:
            assert self.decoder.rotary is not None
            rotary = self.decoder.rotary(hidden, position_ids=own)
        positions = None if positions is None else in_text
        return {**result, "position_ids": positions, "position_embeddings": rotary}

    def _full_mask(
        self, segment: Segment, keys: int, hidden: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Causal mask of ``segment`` and the new tokens, in the form that ``mask``, made for other keys, has."""
        if mask is None:
            return self._padding_mask(segment, keys, hidden)
        if mask.dim() == 2:
            return visible(segment, keys).to(mask.dtype)
        return causal_mask(segment, hidden.shape[1], keys, mask.dtype)


def _after_return(view: View, whole: Segment, sample: int, values: torch.Tensor) -> tuple[View, Keep]:
    """What stands in the sequence now, as a stage that keeps all of it."""
    places = whole.visual[sample].nonzero().squeeze(-1)
    everything = torch.arange(view.total, device=places.device)
    seen = replace(view, tokens=values, index=places, original=places, ordinal=everything)
    return seen, Keep(everything.unsqueeze(0))
