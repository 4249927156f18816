"""TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (arXiv 2507.20630, CVPR 2026).

A token matters when the modules of a few middle layers transform it strongly: how much longer the output of attention
or FFN is than its input, times how far it points elsewhere (token transition variation, TTV). TTV is accumulated over
layers and added to the attention that the instruction is about to pay; the image is thinned out in three steps.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from zoo.engines.reductions import Keep
from zoo.engines.selection import scaled_to_mean
from zoo.engines.tokens import HiddenPlace, Positions, Stage, View
from zoo.engines.upcoming import look_ahead
from zoo.errors import BadInput
from zoo.families.visual_tokens import VisualTokenReducer, in_proportion, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy, Decoder

LAYERS = (7, 9, 12)
"""Layers after which the release prunes, counted from 1, of 32."""
MODULES: tuple[tuple[HiddenPlace, HiddenPlace], ...] = (
    ("attention_in", "attention_out"),
    ("mlp_in", "mlp_out"),
)
"""What a module gets (after the norm) and what it adds to the residual stream."""

Direction = Literal["signed", "absolute"]


@register("transprune")
class TransPrune(VisualTokenReducer):
    """Keeps ``int(N * keep_ratios[j])`` of the ``N`` visual tokens after cut ``j``."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays, mean over decoder layers: keep_ratios is scaled to it. "
        "None = keep_ratios as given (0.41 on 32 layers).",
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of visual tokens that stay, mean over decoder layers; replaces keep_ratio.",
    )
    keep_ratios: tuple[float, ...] = Field(
        (0.875, 0.625, 0.125),
        min_length=1,
        description="Fraction of all visual tokens that stays after each cut (the paper's image_token_ratio_list).",
    )
    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="Layers after which tokens leave, counted from 1. None = 7, 9 and 12 of 32, in proportion.",
    )
    first_layer: int | None = Field(
        None,
        ge=1,
        description="First layer whose transitions count, from 1; all up to the last cut follow. None = the layer of "
        "the first cut (the paper's 7 to 12).",
    )
    transition_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of TTV against attention (the paper's alpha); 1 = no attention at all.",
    )
    direction: Direction = Field(
        "signed",
        description="Change of direction: 1 - cos (signed: the release) or 1 - |cos| (the paper's text).",
    )
    attention_of: Literal["next-layer", "last-layer"] = Field(
        "next-layer",
        description="Whose instruction attention counts: the layer about to run (the release) or the one just run.",
    )

    @model_validator(mode="after")
    def _a_schedule(self) -> TransPrune:
        ratios, layers = self.keep_ratios, self.layers or LAYERS
        if not all(0 < ratio <= 1 for ratio in ratios) or list(ratios) != sorted(ratios, reverse=True):
            raise ValueError("keep_ratios must lie in (0, 1] and may not rise")
        if layers[0] < 1 or list(layers) != sorted(set(layers)):
            raise ValueError("layers must be at least 1 and ascend")
        if len(ratios) != len(layers):
            raise ValueError(f"keep_ratios needs one ratio for each of {len(layers)} cuts")
        return self

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage behind each of ``layers``, which looks at the modules since the cut before.

        Raises:
            BadInput: ``first_layer`` lies behind the first cut.
        """
        if (self.keep_ratio == 1 and self.keep_tokens is None) or self.keep_ratios[-1] == 1:
            return []
        decoder = anatomy.decoder
        assert decoder is not None
        layers = self.layers or in_proportion(LAYERS, len(decoder.layers))
        if self.first_layer is not None and self.first_layer > layers[0]:
            raise BadInput(
                f"transprune: first_layer={self.first_layer} lies behind the first cut, after layer {layers[0]}"
            )
        starts = ((self.first_layer or layers[0]) - 1, *layers[:-1])
        looks_back = self.transition_weight < 1 and self.attention_of == "last-layer"
        return [
            Stage(
                layer,
                partial(self.select, decoder, layers, number, range(start, layer)),
                observes=(layer - 1,) if looks_back else (),
                observes_hidden=tuple(
                    (seen, place) for seen in range(start, layer) for pair in MODULES for place in pair
                ),
            )
            for number, (start, layer) in enumerate(zip(starts, layers, strict=True))
        ]

    def select(self, decoder: Decoder, layers: tuple[int, ...], number: int, seen: range, view: View) -> Keep:
        """The kept tokens of one sample after cut ``number``, in sequence order; ``seen``: layers since the last."""
        so_far = view.memory.setdefault("transprune", torch.zeros(view.total, device=view.tokens.device))
        for layer in seen:
            so_far[view.ordinal] += self.transition(view, layer)
        scores = self.transition_weight * shares(so_far[view.ordinal])
        if self.transition_weight < 1:
            attention = shares(self.instruction_attention(decoder, view))
            scores = scores + (1 - self.transition_weight) * attention
        # Tokens that another method dropped before the first cut do not count: ratios are of what reached this one.
        entered = view.memory.setdefault("transprune tokens", len(view.tokens))
        share = self.schedule(entered, layers, len(decoder.layers))[number]
        return keep(scores.topk(min(max(1, int(entered * share)), len(scores))).indices)

    def transition(self, view: View, layer: int) -> torch.Tensor:
        """TTV of one layer, attention and FFN added, of the visual tokens ``[N]`` float32."""
        places = torch.cat((view.index, view.text_index)).sort().values  # without padding
        whole = sum(
            token_transition(
                view.hidden(layer, before)[places], view.hidden(layer, after)[places], self.direction
            )
            for before, after in MODULES
        )
        assert isinstance(whole, torch.Tensor)
        return whole[torch.searchsorted(places, view.index)]

    def instruction_attention(self, decoder: Decoder, view: View) -> torch.Tensor:
        """Attention that the text after the image pays each visual token, mean over heads and rows, ``[N]``."""
        rows = view.question if len(view.question) else view.last
        ahead = self.attention_of == "next-layer"
        seeing = look_ahead(view, decoder, rows) if ahead else view
        received = seeing.received(view.layer if ahead else view.layer - 1, rows)
        return received[:, view.index].mean(0) / len(rows)

    def schedule(self, total: int, layers: tuple[int, ...], depth: int) -> tuple[float, ...]:
        """Fraction of the ``total`` visual tokens in front of the first cut that stays after each cut.

        Raises:
            BadInput: the layers before the first cut alone see more than the budget, or more is asked for than exists.
        """
        if self.keep_tokens is not None and self.keep_tokens > total:
            raise BadInput(f"keep_tokens={self.keep_tokens}, but this input has only {total} visual tokens")
        mean = self.keep_ratio if self.keep_tokens is None else self.keep_tokens / total
        if mean is None:
            return self.keep_ratios
        if mean * depth <= layers[0]:
            raise BadInput(
                f"transprune prunes from layer {layers[0]} of {depth} on, so more than {layers[0] / depth:.3g} of the "
                f"tokens must stay on average ({mean:.3g} asked for): give earlier layers"
            )
        return scaled_to_mean(self.keep_ratios, layers, depth, mean)


def token_transition(
    before: torch.Tensor, after: torch.Tensor, direction: Direction = "signed"
) -> torch.Tensor:
    """TTV of one module: ratio of norms times the softmax, over tokens, of the change of direction (section 3.2).

    Args:
        before: normalised inputs of the module, ``[S, D]``.
        after: its outputs before the residual sum, ``[S, D]``.
        direction: ``signed`` 1 - cos, or ``absolute`` 1 - |cos|.

    Returns:
        ``[S]`` float32.
    """
    before, after = before.float(), after.float()
    cosine = F.cosine_similarity(before, after, dim=-1)
    turned = 1 - (cosine if direction == "signed" else cosine.abs())
    return after.norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12) * turned.softmax(0)


def shares(scores: torch.Tensor) -> torch.Tensor:
    """``scores [N]``, not negative, divided by their sum."""
    return scores / (scores.sum() + 1e-8)
