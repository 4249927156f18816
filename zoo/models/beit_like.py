"""BEiT: a ViT whose attention also knows how far apart two patches are (relative position bias)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from zoo.errors import Refused
from zoo.models.anatomy import Anatomy, EncoderBlock, architecture
from zoo.models.vit_like import encoder_parts


@architecture("beit")
def beit_like(model: Any) -> Anatomy:
    """Anatomy of a bare BEiT or of one with a head for classification or masked patches.

    Raises:
        Refused: a segmentation head or a backbone, which lay the patches of several blocks out on their grid.
    """
    if hasattr(model, "fpn"):
        raise Refused(
            f"{type(model).__name__} lays the patches of several blocks out on their grid, so none may leave: load "
            "the encoder alone, or with a classification head"
        )
    encoder = encoder_parts(model)
    shared = model.base_model.shared_position_bias is not None
    blocks = tuple(_block(block, shared) for block in encoder.blocks)
    return Anatomy(kind="encoder", model_type="beit", encoder=replace(encoder, blocks=blocks))


def _block(block: EncoderBlock, shared: bool) -> EncoderBlock:
    """With dropout in front of layer scale, and the relative positions of this block or of the whole encoder."""
    module: Any = block.module
    own = module.relative_position_bias
    return replace(
        block,
        scale1=lambda x: module.lambda_1 * module.dropout(x),
        scale2=lambda x: module.lambda_2 * module.dropout(x),
        pair_bias=_pair_bias(module) if shared or own is not None else None,
    )


def _pair_bias(module: Any) -> Callable[[int, torch.Tensor | None, dict[str, Any]], torch.Tensor | None]:
    def bias(tokens: int, given: torch.Tensor | None, arguments: dict[str, Any]) -> torch.Tensor | None:
        """What the block hands to its attention as a mask; the bias that all blocks share is in ``given`` already."""
        interpolated = arguments.pop("interpolate_pos_encoding", False)
        resolution = arguments.pop("resolution", None)
        if module.relative_position_bias is None:
            return given
        height, width = resolution
        window = (height // module.patch_size, width // module.patch_size)
        own: torch.Tensor = module.relative_position_bias(window, interpolated, dim_size=tokens)
        return own if given is None else own + given

    return bias
