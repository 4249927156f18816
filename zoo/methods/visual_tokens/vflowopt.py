"""VFlowOpt: Token Pruning with Visual Information Flow-Guided Optimization (arXiv 2508.05211, ICCV 2025).

One importance map per picture, made in the vision encoder, serves three cuts. Important is what the most attended
patches (attention sinks) attend to, plus patch entropy. Before the LLM the least important tokens are merged inside the
cells of a grid; in front of two decoder layers the next ones leave. All knobs come from a search that keeps the
last token's final state near the unpruned one (``VFlowOpt.fit``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from zoo.engines.crops import feature_layer
from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.reductions import Join, Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, in_proportion, keep
from zoo.interface import register
from zoo.methods.visual_tokens._patch_importance import global_attention, patch_entropy
from zoo.methods.visual_tokens._recycling import cells, count_low, recycle
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy

LAYERS, DEPTH = (9, 18), 28
"""Decoder layers in front of which the release prunes, and how many its model has."""


@dataclass(frozen=True)
class Plan:
    """What the search finds: threshold ``t``, side of a cell ``a``, shares kept at the three cuts ``r0, r1, r2``."""

    threshold: float
    cell: float
    shares: tuple[float, float, float]


PLANS = {
    0.5: Plan(28.683, 11.757, (0.7233, 0.7487, 0.487)),
    0.25: Plan(34.760, 15.581, (0.2651, 0.9833, 0.8773)),
    0.1: Plan(39.265, 17.387, (0.1166, 1.0, 0.6011)),
}
"""Presets of the release, by mean share of visual tokens (LLaVA-OneVision-7B)."""


@register("vflowopt")
class VFlowOpt(KeepsShare, VisualTokenReducer):
    """Keeps ``keep_ratio`` of the visual tokens, mean over decoder layers, in three cuts by one importance map."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays, mean over decoder layers. The release has presets for "
        "0.5, 0.25 and 0.1; other values take the nearest, scaled.",
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of visual tokens that stay, mean over decoder layers; replaces keep_ratio.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        description="How many times the mean a patch must receive to be global (the paper's t); None = preset.",
    )
    cell: float | None = Field(
        None, gt=0, description="Side of a recycling cell, in tokens (the paper's a). None = preset."
    )
    entropy_weight: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="Weight of the patches' entropy (the paper's alpha_v); 0 in all presets of the release.",
    )
    first_share: float | None = Field(
        None, gt=0, le=1, description="Fraction that enters the LLM (the paper's r0). None = preset, scaled."
    )
    second_share: float | None = Field(
        None, gt=0, le=1, description="Fraction of these that passes the second cut (r1). None = preset."
    )
    third_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of these that passes the third cut (r2). None = preset where the others are, else what "
        "the budget leaves.",
    )
    layers: tuple[int, int] | None = Field(
        None,
        description="Decoder layers in front of the last two cuts, from 0. None = 9 and 18 of 28, in proportion.",
    )
    encoder_layer: int | None = Field(
        None,
        description="Encoder block whose attention is read; negative from the end. None = the one that feeds the LLM.",
    )
    pixel_mean: tuple[float, float, float] = Field(
        (0.5, 0.5, 0.5),
        description="Mean that the image processor subtracts (entropy only; default: SigLIP).",
    )
    pixel_std: tuple[float, float, float] = Field(
        (0.5, 0.5, 0.5), description="Deviation that it divides by (entropy only; default: SigLIP)."
    )

    @model_validator(mode="after")
    def _ascending_layers(self) -> VFlowOpt:
        if self.layers is not None and not 1 <= self.layers[0] < self.layers[1]:
            raise ValueError("layers must be at least 1 and ascend")
        return self

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM and two inside."""
        if self.keeps_all:
            return []
        lengths = self.lengths(anatomy)
        second = lengths[0]
        third = second + lengths[1]
        layer = feature_layer(anatomy) if self.encoder_layer is None else self.encoder_layer
        return [
            # The shorter prompt gets positions of its own; inside, survivors keep these.
            Stage(
                -1,
                partial(self.enter, layer, lengths),
                observes_encoder=(EncoderWatch(layer),),
                positions="renumber",
            ),
            Stage(second, partial(self.thin_out, lengths, 1)),
            Stage(third, partial(self.thin_out, lengths, 2)),
        ]

    def lengths(self, anatomy: Anatomy) -> tuple[int, int, int]:
        """Decoder layers behind each of the three cuts."""
        assert anatomy.decoder is not None
        depth = len(anatomy.decoder.layers)
        second, third = self.layers or in_proportion(LAYERS, depth, DEPTH)
        return second, third - second, depth - third

    def plan(self, total: int, lengths: tuple[int, int, int]) -> Plan:
        """Threshold, cell and shares for a sample of ``total`` visual tokens.

        Args:
            total: before any reduction.
            lengths: decoder layers behind each cut.

        Raises:
            BadInput: the first two shares alone exceed the budget, or more is asked for than exists.
        """
        mean = self.keep_ratio if self.keep_tokens is None else self.count(total) / total
        near = min(PLANS, key=lambda known: abs(known - mean))
        known = PLANS[near]
        first = min(1.0, known.shares[0] * mean / near) if self.first_share is None else self.first_share
        second = known.shares[1] if self.second_share is None else self.second_share
        third = self.third_share
        if third is None:
            as_preset = mean == near and self.first_share is None and self.second_share is None
            third = known.shares[2] if as_preset else last_share(mean, first, second, lengths)
        threshold = known.threshold if self.threshold is None else self.threshold
        return Plan(threshold, known.cell if self.cell is None else self.cell, (first, second, third))

    def enter(self, layer: int, lengths: tuple[int, int, int], view: View) -> Join | Keep:
        """What enters the LLM of one sample, in sequence order; notes the importance for the later cuts."""
        plan, pictures = self.plan(view.total, lengths), view.images
        importance = torch.cat([self.importance(image, layer, plan.threshold) for image in pictures])
        noted = torch.ones(view.total, device=view.tokens.device)
        noted[view.ordinal[torch.cat([image.tokens for image in pictures])]] = importance.to(noted)
        view.memory["vflowopt"] = noted
        importance, share = noted[view.ordinal], plan.shares[0]
        if len(pictures) == 1 and not pictures[0].video:
            return recycle(
                importance, *cells(pictures[0], plan.cell), count_low(len(importance), share, plan.cell)
            )
        # Several pictures and videos are cut without recycling, each by its own ranking.
        return keep(torch.cat([image.tokens[most(importance[image.tokens], share)] for image in pictures]))

    def importance(self, image: ImageView, layer: int, threshold: float) -> torch.Tensor:
        """Importance of the tokens of one picture, ``[n]`` float32; newlines get 1, so they stay."""
        start = image.prefix

        def rows(patches: torch.Tensor) -> torch.Tensor:
            return image.encoder_rows(layer, patches + start)[..., start:].mean(1)

        received = image.encoder_received(layer)[..., start:].mean(1)
        values = global_attention(received, rows, threshold)
        if self.entropy_weight:
            values = values + self.entropy_weight * patch_entropy(self.pixels(image)).softmax(-1)
        return torch.where(image.newline, 1.0, image.on_tokens(values))

    def pixels(self, image: ImageView) -> torch.Tensor:
        """Pixels of every patch as they were before normalisation, 0 to 255, ``[crops, P, 3, pixels]``."""
        pixels = image.patch_pixels().float().flatten(3)
        mean, std = (pixels.new_tensor(x).unsqueeze(-1) for x in (self.pixel_mean, self.pixel_std))
        return ((pixels * std + mean) * 255).round().clamp(0, 255)

    def thin_out(self, lengths: tuple[int, int, int], cut: int, view: View) -> Keep:
        """Tokens of one sample that pass a cut inside the LLM, in sequence order."""
        importance = view.memory["vflowopt"][view.ordinal]
        return keep(most(importance, self.plan(view.total, lengths).shares[cut]))

    @classmethod
    def fit(
        cls,
        loaded: LoadedModel,
        samples: Iterable[Mapping[str, Any]],
        *,
        keep_ratio: float = 0.25,
        calls: int = 300,
        initial: int = 27,
        seed: int = 42,
        progress: Callable[[int, int], None] | None = None,
        **parameters: Any,
    ) -> VFlowOpt:
        """The method with the knobs that change the last token's final state least, by Bayesian optimisation.

        Args:
            loaded: a vision-language model, without hooks of other methods.
            samples: inputs of one sample each, as the processor makes them; the paper uses 30.
            keep_ratio: the budget, which decides the third share.
            calls: settings that are tried, each on all samples.
            initial: how many of them are random.
            seed: of the search.
            progress: called with the settings tried and their number.
            parameters: other fields of the method.

        Raises:
            BadInput: no sample, or nothing to search for.
        """
        from zoo.methods.visual_tokens._vflowopt_search import search

        return search(
            cls,
            loaded,
            samples,
            keep_ratio,
            calls=calls,
            initial=initial,
            seed=seed,
            progress=progress,
            parameters=parameters,
        )


def most(importance: torch.Tensor, share: float) -> torch.Tensor:
    """All but the ``round(N * (1 - share))`` least important of ``importance [N]``."""
    return importance.argsort(stable=True)[round(len(importance) * (1 - share)) :]


def last_share(mean: float, first: float, second: float, lengths: tuple[int, int, int]) -> float:
    """Share kept at the third cut so that the decoder layers see ``mean`` of all visual tokens on average.

    Raises:
        BadInput: nothing would be left for the layers behind it.
    """
    left = sum(lengths) * mean - lengths[0] * first - lengths[1] * first * second
    if left <= 0:
        raise BadInput(
            f"vflowopt: shares of {first:.3g} and {second:.3g} at the first two cuts leave nothing of a mean of "
            f"{mean:.3g}: lower first_share or second_share, or set third_share"
        )
    return min(1.0, left / lengths[2] / (first * second))
