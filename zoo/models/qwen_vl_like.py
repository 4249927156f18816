"""Qwen2.5-VL and Qwen3-VL: pictures of any shape in one long encoder sequence, neighbouring patches merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from zoo.models.anatomy import Anatomy, architecture
from zoo.models.llama_like import decoder_parts
from zoo.models.packing import WHOLE, Packed, Part, Placeholders, raster
from zoo.models.vit_like import encoder_parts


@architecture("qwen2_5_vl", "qwen3_vl")
def qwen_vl(model: Any) -> Anatomy:
    """Anatomy of ``Qwen2_5_VLForConditionalGeneration`` and ``Qwen3VLForConditionalGeneration``."""
    inner, config = model.model, model.config
    return Anatomy(
        kind="vlm",
        model_type=config.model_type,
        decoder=decoder_parts(inner.language_model, model.lm_head),
        encoder=replace(encoder_parts(inner.visual), packed_order=_order(inner.visual)),
        projector=inner.visual.merger,
        vlm=inner,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        packer=pack_merged,
        feature_layer=-1,
    )


def _order(visual: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The order in which the blocks see the patches: window by window where the encoder has windows."""
    window = getattr(visual, "window_size", None)
    merged = visual.spatial_merge_size**2

    def order(grids: torch.Tensor) -> torch.Tensor:
        if window is None:
            return torch.arange(int(grids.prod(-1).sum()))
        index, _ = get_vision_window_index(grids.cpu(), visual.spatial_merge_size, window, visual.patch_size)
        return (index.unsqueeze(1) * merged + torch.arange(merged)).flatten()

    return order


def pack_merged(vlm: Any, kind: str, given: Mapping[str, Any], places: Placeholders) -> list[Packed]:
    """Neighbouring patches stand side by side in the encoder's input, so token ``j`` has patches ``4j .. 4j + 3``.

    A crop is one frame (a temporal patch): frames do not attend to each other. Pictures have one.
    """
    video = kind == "video"
    grids = given["video_grid_thw" if video else "image_grid_thw"].cpu()
    side = vlm.visual.spatial_merge_size
    packed, first = [], 0
    for grid in grids:
        frames, rows, columns = grid.tolist()
        merged = (rows // side, columns // side)
        shape = (frames, *merged) if video else merged
        tokens = frames * merged[0] * merged[1]
        packed.append(
            Packed(
                patches=torch.arange(tokens * side**2).view(tokens, side**2),
                part=torch.zeros(tokens).long(),
                coordinates=raster(*shape),
                parts=(Part(shape, tuple(range(frames))),),
                first_crop=first,
                crops=frames,
                patch_coordinates=get_vision_position_ids(torch.tensor([[1, rows, columns]]), side),
                boxes=(WHOLE,) * frames,
                video=video,
            )
        )
        first += frames
    return packed
