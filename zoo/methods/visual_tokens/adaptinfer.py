"""AdaptInfer: Adaptive Token Pruning for VLM Inference with Dynamical Text Guidance (arXiv 2508.06084, EMNLP 2026).

After three decoder layers, visual tokens are ranked by the attention that text pays them in that layer. Every text row
is weighted, head by head, by how much attention it exchanges with the other text in the same layer, so the guidance
follows the model. Which three layers: where the attention that visual tokens receive shifts, found once per model on
samples (``AdaptInfer.fit``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, in_proportion, keep
from zoo.interface import register
from zoo.methods.visual_tokens._attention_shift import shift_layers
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy

LAYERS = (1, 10, 20)
"""Layers after which the release prunes LLaVA-1.5, counted from 0, of 32."""
COUNTS = {128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)}
"""Tokens left of 576 after each cut, by budget (LLaVA-1.5-7B)."""
TOKENS = 576
_ROWS = 64
"""Text rows of attention that are computed at once."""


@register("adaptinfer")
class AdaptInfer(KeepsShare, VisualTokenReducer):
    """Keeps the visual tokens that the text attends to, weighted by the text's own attention."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        128 / TOKENS,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays on average, as the paper counts its budgets of 128, 64, "
        "48 and 32 of 576: the layer after which tokens leave counts as short. Counts between these are interpolated.",
    )
    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="Layers after which tokens leave, from 0. None = 1, 10 and 20 of 32, in proportion; "
        "AdaptInfer.fit finds them on samples.",
    )
    counts: tuple[int, ...] | None = Field(
        None,
        description="Tokens left after each cut; replaces keep_ratio (13B: 300, 94, 30 for 128; 148, 40, 5 for 64).",
    )
    ratios: tuple[float, ...] | None = Field(
        None,
        description="Fraction of its tokens that each cut passes on; replaces keep_ratio (Qwen2-VL after layers 0, 9, "
        "19 of 28: .17, .6, .3 for 10%; .5, .6, .3 for 30%; .7, .9, .3 for 50%).",
    )

    @model_validator(mode="after")
    def _a_schedule(self) -> AdaptInfer:
        layers = self.layers or LAYERS
        if layers[0] < 0 or list(layers) != sorted(set(layers)):
            raise ValueError("layers must be at least 0 and ascend")
        if self.counts is not None and self.ratios is not None:
            raise ValueError("give counts or ratios, not both")
        if min(self.counts or (0,)) < 0 or not all(0 < ratio <= 1 for ratio in self.ratios or ()):
            raise ValueError("counts may not be negative, and ratios must lie in (0, 1]")
        given = self.ratios if self.counts is None else self.counts
        if len(LAYERS if given is None else given) != len(layers):
            raise ValueError(f"{len(layers)} layers need counts or ratios of the same number")
        return self

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage behind each of ``layers``, which looks at the attention of that layer."""
        assert anatomy.decoder is not None
        if self.counts is None and (self.keeps_all if self.ratios is None else min(self.ratios) == 1):
            return []
        layers = self.layers or in_proportion(LAYERS, len(anatomy.decoder.layers))
        return [
            Stage(layer + 1, partial(self.select, number), observes=(layer,))
            for number, layer in enumerate(layers)
        ]

    def select(self, number: int, view: View) -> Keep:
        """The kept tokens of one sample after cut ``number``, in sequence order."""
        rows = view.question if len(view.question) else view.last
        scores = text_guided_scores(partial(view.attention, view.layer - 1), rows, view.index)
        # Tokens that another method dropped before the first cut do not count.
        entered = view.memory.setdefault("adaptinfer tokens", len(view.tokens))
        return keep(scores.topk(self.left(number, entered, len(scores))).indices)

    def left(self, number: int, total: int, present: int) -> int:
        """Tokens left of ``present`` ones after cut ``number``, where a sample began with ``total``.

        As in the release: a ratio of those present keeps at least 1 and at most all; a count at most all but one.

        Raises:
            BadInput: ``keep_tokens`` is more than ``total``.
        """
        if self.ratios is not None:
            return min(max(1, int(self.ratios[number] * present)), present)
        if self.counts is not None:
            count = self.counts[number]
        else:
            share = self.keep_ratio if self.keep_tokens is None else self.count(total) / total
            count = round(counts_for(share * TOKENS)[number] * total / TOKENS)
        return max(0, min(count, present - 1))

    @classmethod
    def fit(
        cls,
        loaded: LoadedModel,
        samples: Iterable[Mapping[str, Any]],
        *,
        share: float = 0.1,
        **parameters: Any,
    ) -> AdaptInfer:
        """The method with the layers at which the attention to visual tokens shifts (section 3.3 of the paper).

        Args:
            loaded: a vision-language model, without hooks of other methods.
            samples: inputs of one sample each, as the processor makes them; the paper uses about 1000.
            share: of its visual tokens, those that receive most over all layers, whose curves count.
            parameters: other fields of the method.

        Raises:
            BadInput: no sample, a padded or text-only one, or too few different shifts.
        """
        given = parameters.get("counts") or parameters.get("ratios") or LAYERS
        return cls(layers=shift_layers(loaded, samples, len(given), share), **parameters)


def text_guided_scores(
    attention: Callable[[torch.Tensor], torch.Tensor], text: torch.Tensor, visual: torch.Tensor
) -> torch.Tensor:
    """``s_v = sum_h sum_j p_hj A_h[j, v]`` with ``p_hj`` the row sum of ``W + W^T - diag(W)``, W the text block of A.

    Rows are asked for a few at a time (twice, when there are many), so that no full map exists.

    Args:
        attention: from query places ``[R]`` to causal attention ``[H, R, L]`` float32.
        text: places of the text after the image, ``[T]``.
        visual: places of the visual tokens, ``[N]``.

    Returns:
        ``[N]`` float32.
    """
    prior, kept, start = None, None, 0
    parts = text.split(max(1, min(_ROWS, (len(text) + len(visual)) // 4)))
    for part in parts:
        kept = attention(part)
        within = kept[..., text]
        prior = within.new_zeros(len(within), len(text)) if prior is None else prior
        own = slice(start, start + len(part))
        diagonal = within[..., own].diagonal(dim1=-2, dim2=-1)
        prior += within.sum(1)
        prior[:, own] += within.sum(-1) - diagonal
        start += len(part)
    assert prior is not None
    scores, start = prior.new_zeros(len(visual)), 0
    for part in parts:
        rows = kept if kept is not None and len(parts) == 1 else attention(part)
        scores += (prior[:, None, start : start + len(part)] @ rows[..., visual]).sum((0, 1))
        start += len(part)
    return scores


def counts_for(budget: float) -> tuple[float, ...]:
    """Tokens left of 576 after each cut, linear between the budgets of the paper, none at 18 = 576 / 32."""
    known = {TOKENS // 32: (0, 0, 0), **dict(sorted(COUNTS.items())), TOKENS: (TOKENS,) * len(LAYERS)}
    if budget <= TOKENS // 32:
        return known[TOKENS // 32]
    low, high = next((a, b) for a, b in pairwise(known) if budget <= b)
    way = (budget - low) / (high - low)
    return tuple(a + way * (b - a) for a, b in zip(known[low], known[high], strict=True))
