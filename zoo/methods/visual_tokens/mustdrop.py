"""MustDrop: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (arXiv 2411.10803).

Three places. Behind the encoder's first block, windows of nearly identical patches become their mean, and the tokens
with the highest [CLS] attention are noted as *key* tokens. Behind four decoder layers a token leaves when the text
attends to it too little in sum and no single text token attends to it enough; key tokens stay. When the prompt is read,
the caches of the layers between the first and the last of these lose what the last one removed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from zoo.engines.attention_mass import sum_and_peak
from zoo.engines.blocks import BlockStage, BlockView
from zoo.engines.crops import feature_layer
from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.reductions import Keep, Merge
from zoo.engines.tokens import Positions, Stage, View
from zoo.engines.windows import merge_windows
from zoo.families.visual_tokens import in_proportion, keep
from zoo.families.visual_tokens_in_encoder import InEncoderReducer
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy

LAYERS = (2, 6, 10, 14)
"""Layers whose attention filters, counted from 0, of 32."""


@register("mustdrop")
class MustDrop(InEncoderReducer):
    """Merges alike patches, drops what no text looks at, trims the cache to what is left."""

    positions: ClassVar[Positions] = "renumber"

    merge_threshold: float = Field(
        0.8,
        description="Mean cosine similarity from which a window of patches becomes one token; above 1 = none.",
    )
    window: int = Field(3, ge=2, description="Side of the windows, in patches.")
    key_ratio: float = Field(
        0.08,
        ge=0,
        le=1,
        description="Fraction of the tokens of each crop, by [CLS] attention, that never leaves.",
    )
    global_threshold: float = Field(
        0.001,
        ge=0,
        description="A token may leave when its share of the text's attention to visual tokens is below this "
        "(release: 0.001, 0.0012 and 0.011 for 192, 128 and 64 of 576 tokens on average) ...",
    )
    individual_threshold: float = Field(
        0.001,
        ge=0,
        description="... and no text token pays it as much as this (release: 0.001, 0.001 and 0.01). Shares average "
        "1/N: other numbers of tokens need other thresholds.",
    )
    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="Decoder layers, counted from 0, whose attention filters. None = 2, 6, 10, 14 of 32, in "
        "proportion.",
    )

    @model_validator(mode="after")
    def _layers_ascend(self) -> MustDrop:
        if self.layers is not None and (
            min(self.layers) < 0 or list(self.layers) != sorted(set(self.layers))
        ):
            raise ValueError("layers must be at least 0 and ascend")
        return self

    def check(self, loaded: LoadedModel) -> None:
        """Refuse grids that windows do not fill, and encoders without a block behind the projected layer."""
        super().check(loaded)
        encoder = loaded.anatomy.encoder
        assert encoder is not None
        side = encoder.image_size // encoder.patch_size
        if side % self.window:
            raise refuse(
                self, f"an encoder grid that windows of {self.window} fill", f"{side} patches per side"
            )
        if feature_layer(loaded.anatomy) % len(encoder.blocks) + 1 == len(encoder.blocks):
            raise refuse(
                self, "a block behind the projected layer, for key tokens", "a projector on the last one"
            )

    # --- stage 1: the encoder ---------------------------------------------------------------------------------

    def encoder_stages(self, anatomy: Anatomy) -> list[BlockStage]:
        """Merging behind block 0; in front of block 1 the padding of crops that merge more is told."""
        if self.merge_threshold > 1 and not self.filters:
            return []
        return [BlockStage(0, self.merge, place="after"), BlockStage(1, _tell_padding, place="before")]

    def merge(self, view: BlockView) -> Merge | None:
        """Windows of all crops; crops with fewer tokens than others are filled up with zeros."""
        plans = [merge_windows(x, view.prefix, self.window, self.merge_threshold) for x in view.tokens]
        lengths = [int(plan.max()) + 1 for plan in plans]
        if min(lengths) == view.tokens.shape[1]:
            return None
        assignment = torch.stack(plans)
        slots = torch.arange(max(lengths), device=assignment.device)
        view.memory["valid"] = slots < slots.new_tensor(lengths).unsqueeze(1)
        members = torch.stack([plan.bincount(minlength=max(lengths)) for plan in plans])
        places = torch.arange(assignment.shape[1], device=assignment.device).expand_as(assignment)
        anchor = members.new_zeros(members.shape).scatter_reduce(
            1, assignment, places, "amin", include_self=False
        )
        # Weights that add up to one: an empty slot stays zero, where a mean would be 0 / 0.
        return Merge(assignment, 1 / members.gather(1, assignment).float(), anchor, normalise=False)

    def first_stage(self, anatomy: Anatomy) -> Stage:
        """In front of the LLM: one token of each window goes on."""
        assert anatomy.encoder is not None
        layer = feature_layer(anatomy) % len(anatomy.encoder.blocks) + 1
        watch = (EncoderWatch(layer),)
        return Stage(-1, partial(self.unique, layer), observes_encoder=watch)

    def unique(self, layer: int, view: View) -> Keep:
        """The first token of each encoder token, crop by crop in the encoder's order; newlines leave."""
        key = torch.zeros(view.total, dtype=torch.bool, device=view.index.device)
        chosen = []
        for image in view.images:
            for crop, slot in enumerate(view.encoder_slots(image)):
                important = self.key_slots(image, crop, layer, slot)
                own = (image.crop == crop).nonzero().squeeze(-1)
                of_token = slot[image.patches[own, 0] % image.patches_per_crop]
                order = of_token.argsort(stable=True)
                first = of_token[order].diff(prepend=of_token.new_full((1,), -1)) > 0
                tokens = image.tokens[own[order[first]]]
                chosen.append(tokens)
                key[view.ordinal[tokens[torch.isin(of_token[order[first]], important)]]] = True
        view.memory["key"] = key
        return Keep(torch.cat(chosen).unsqueeze(0))

    def key_slots(self, image: ImageView, crop: int, layer: int, slot: torch.Tensor) -> torch.Tensor:
        """Encoder tokens (prefix not counted) of one crop that [CLS] attends to most, ``[ceil(key_ratio * n)]``.

        The block behind the projected layer sees the full grid again; what a window's patches have in common counts
        once, as in a block that runs short.
        """
        patches = torch.arange(len(slot), device=slot.device)
        number = int(slot.max()) + 1
        first = slot.new_zeros(number).scatter_reduce(0, slot, patches, "amin", include_self=False)
        columns = torch.cat((torch.arange(image.prefix, device=slot.device), image.prefix + first))
        query = image.encoder_queries(layer)[crop, :, 0].float()
        keys = image.encoder_keys(layer)[crop][:, columns].float()
        row = torch.einsum("hd,hnd->hn", query, keys).mul(query.shape[-1] ** -0.5).softmax(-1)
        return row.mean(0)[image.prefix :].topk(math.ceil(self.key_ratio * number)).indices

    # --- stages 2 and 3: the decoder --------------------------------------------------------------------------

    @property
    def filters(self) -> bool:
        """False when no token can be below the thresholds."""
        return self.global_threshold > 0 and self.individual_threshold > 0

    def decoder_stages(self, anatomy: Anatomy) -> list[Stage]:
        """One behind each of ``layers``; the last one also trims the caches from the first of them on."""
        if not self.filters:
            return []
        assert anatomy.decoder is not None
        layers = self.layers or in_proportion(LAYERS, len(anatomy.decoder.layers))
        return [
            Stage(layer + 1, self.filter, observes=(layer,), trims=layers[0] if layer == layers[-1] else None)
            for layer in layers
        ]

    def filter(self, view: View) -> Keep:
        """Key tokens, and those that the text attends to, in sequence order."""
        total, peak = sum_and_peak(view, view.layer - 1)
        stays = attended(total, peak, self.global_threshold, self.individual_threshold)
        return keep((stays | view.memory["key"][view.ordinal]).nonzero().squeeze(-1))


def _tell_padding(view: BlockView) -> Keep | None:
    valid = view.memory.get("valid")
    if valid is None or bool(valid.all()):
        return None
    return Keep(torch.arange(valid.shape[1], device=valid.device).expand_as(valid), valid)


def attended(total: torch.Tensor, peak: torch.Tensor, share: float, least: float) -> torch.Tensor:
    """The dual filter, ``[N]`` bool: a token leaves when ``total`` is less than ``share`` of its sum over all tokens,
    and ``peak`` less than ``least``.
    """
    return ~((total < share * total.sum()) & (peak < least))
