"""Idefics3 and SmolVLM: tiles and a global view, folded by pixel shuffle, with text between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.models.anatomy import Anatomy, architecture
from zoo.models.llama_like import decoder_parts
from zoo.models.packing import Packed, Placeholders, parallel_parts, raster, tile_boxes
from zoo.models.vit_like import encoder_parts


@architecture("idefics3", "smolvlm")
def idefics(model: Any) -> Anatomy:
    """Anatomy of ``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``."""
    inner, config = model.model, model.config
    return Anatomy(
        kind="vlm",
        model_type=config.model_type,
        decoder=decoder_parts(inner.text_model, model.lm_head),
        encoder=encoder_parts(inner.vision_model),
        projector=inner.connector,
        vlm=inner,
        image_token_id=config.image_token_id,
        packer=pack_with_text,
        feature_layer=-1,
    )


def pack_with_text(vlm: Any, kind: str, given: Mapping[str, Any], places: Placeholders) -> list[Packed]:
    """A run of placeholders is one crop. The global view, which every picture ends with, has a marker of its own in
    front: the token in front of the last run. (A frame of a video is a picture with only a global view.)
    """
    pixels = given["pixel_values"].flatten(0, 1)
    pixels = pixels[
        (pixels != 0).flatten(1).any(1)
    ]  # batches are padded with black pictures, which are not encoded
    patch, factor = vlm.config.vision_config.patch_size, vlm.config.scale_factor
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    numbers = torch.arange(rows * columns).view(1, -1, 1)
    tokens = vlm.connector.pixel_shuffle(numbers, factor)[0]
    grid = (rows // factor, columns // factor)
    packed, first, crops = [], 0, 0
    for sample in range(len(places.mask)):
        runs = places.runs(sample)
        markers = [int(places.ids[sample, start - 1]) if start else -1 for start, _ in runs]
        for marker, (_, length) in zip(markers, runs, strict=True):
            crops += length // len(tokens)
            if marker == markers[-1]:
                steps = torch.arange(crops).view(-1, 1, 1) * rows * columns
                boxes = tile_boxes(pixels[first : first + crops])
                packed.append(parallel_parts(tokens + steps, grid, first, raster(rows, columns), boxes))
                first, crops = first + crops, 0
    return packed
