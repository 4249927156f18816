"""InternVL: tiles and a thumbnail, each folded to a quarter of its tokens by pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.models.anatomy import Anatomy, architecture
from zoo.models.llama_like import decoder_parts
from zoo.models.packing import Packed, Placeholders, parallel_parts, raster, tile_boxes
from zoo.models.vit_like import encoder_parts


@architecture("internvl")
def internvl(model: Any) -> Anatomy:
    """Anatomy of ``InternVLForConditionalGeneration``."""
    inner, config = model.model, model.config
    return Anatomy(
        kind="vlm",
        model_type=config.model_type,
        decoder=decoder_parts(inner.language_model, model.lm_head),
        encoder=encoder_parts(inner.vision_tower),
        projector=inner.multi_modal_projector,
        vlm=inner,
        image_token_id=config.image_token_id,
        packer=pack_shuffled,
        feature_layer=config.vision_feature_layer,
        drops_cls=config.vision_feature_select_strategy == "default",
    )


def pack_shuffled(vlm: Any, kind: str, given: Mapping[str, Any], places: Placeholders) -> list[Packed]:
    """Every unbroken run of placeholders is one picture: its tiles, then (behind several tiles) its thumbnail."""
    pixels, patch = given["pixel_values"], vlm.config.vision_config.patch_size[0]
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    numbers = torch.arange(rows * columns).view(1, rows, columns, 1)
    folded = vlm.pixel_shuffle(numbers, scale_factor=vlm.config.downsample_ratio)[0]
    grid, tokens = (folded.shape[0], folded.shape[1]), folded.flatten(0, 1)
    packed, first = [], 0
    for sample in range(len(places.mask)):
        for _, length in places.runs(sample):
            crops = length // len(tokens)
            steps = torch.arange(crops).view(-1, 1, 1) * rows * columns
            boxes = tile_boxes(pixels[first : first + crops])
            packed.append(parallel_parts(tokens + steps, grid, first, raster(rows, columns), boxes))
            first += crops
    return packed
