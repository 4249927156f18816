"""LLaVA-like vision-language models: encoder, projector, decoder; visual tokens replace placeholder ids.

LLaVA-1.5 shows each picture once. LLaVA-NeXT and LLaVA-OneVision add crops at a higher resolution: their tokens are
joined to one mosaic, the padding is cut off, and every row ends with a newline token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from zoo.errors import Refused
from zoo.models.anatomy import Anatomy, architecture
from zoo.models.llama_like import decoder_parts
from zoo.models.packing import WHOLE, Box, Packed, Packer, Part, Placeholders, raster
from zoo.models.vit_like import encoder_parts

# What the numbered patches that go through a model's own packing code carry: which picture they belong to ...
_NEWLINE, _BASE, _MOSAIC = -1.0, 0.0, 1.0
# ... and their row and column in it, counted over all crops of a mosaic.


@architecture("llava")
def llava(model: Any) -> Anatomy:
    """Anatomy of ``LlavaForConditionalGeneration``."""
    return _anatomy(model, pack_whole)


@architecture("llava_next", "llava_onevision")
def llava_any_resolution(model: Any) -> Anatomy:
    """Anatomy of ``LlavaNextForConditionalGeneration`` and ``LlavaOnevisionForConditionalGeneration``."""
    return _anatomy(model, pack_any_resolution)


def _anatomy(model: Any, packer: Packer) -> Anatomy:
    inner, config = model.model, model.config
    return Anatomy(
        kind="vlm",
        model_type=config.model_type,
        decoder=decoder_parts(inner.language_model, model.lm_head),
        encoder=encoder_parts(inner.vision_tower),
        projector=inner.multi_modal_projector,
        vlm=inner,
        image_token_id=config.image_token_id,
        video_token_id=getattr(config, "video_token_id", None),
        packer=packer,
        feature_layer=config.vision_feature_layer,
        drops_cls=config.vision_feature_select_strategy == "default",
    )


def pack_whole(vlm: Any, kind: str, given: Mapping[str, Any], places: Placeholders) -> list[Packed]:
    """LLaVA-1.5: one token per patch, in raster order.

    Raises:
        Refused: the encoder takes pictures of any shape in one sequence (Pixtral).
    """
    if given.get("image_sizes") is not None:
        raise Refused(
            "encoders that take pictures of several sizes at once are not supported in LLaVA models yet"
        )
    patch = vlm.config.vision_config.patch_size
    count, _, height, width = given["pixel_values"].shape
    grid = (height // patch, width // patch)
    cells = raster(*grid)
    patches, part, coordinates = torch.arange(len(cells)).unsqueeze(1), torch.zeros(len(cells)).long(), cells
    strategy = given.get("vision_feature_select_strategy") or vlm.config.vision_feature_select_strategy
    if strategy == "full":  # the prefix tokens come along, and were made from no patch in particular
        prefix = encoder_parts(vlm.vision_tower).prefix
        patches, part, coordinates = (_behind(x, prefix) for x in (patches, part, coordinates))
    return [
        Packed(patches, part, coordinates, (Part(grid, (0,)),), index, 1, cells)
        for index in range(int(count))
    ]


def _behind(x: torch.Tensor, prefix: int) -> torch.Tensor:
    """``x`` with ``prefix`` rows of -1 in front."""
    return torch.cat((x.new_full((prefix, *x.shape[1:]), -1), x))


def pack_any_resolution(vlm: Any, kind: str, given: Mapping[str, Any], places: Placeholders) -> list[Packed]:
    """LLaVA-NeXT and LLaVA-OneVision: thumbnail, then mosaic with newlines; or the frames of a video."""
    if kind == "video":
        return _pack_video(vlm, given)
    config = vlm.config
    side = config.vision_config.image_size
    rows = side // config.vision_config.patch_size
    alone = given.get("batch_num_images")
    several = [] if alone is None else [int(n) != 1 for n in alone for _ in range(int(n))]
    packed, first = [], 0
    for index, (height, width) in enumerate(torch.as_tensor(given["image_sizes"]).tolist()):
        tiled = not (several and several[index])
        crops = image_size_to_num_patches((height, width), config.image_grid_pinpoints, side) if tiled else 1
        grid = (
            get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, side)
            if tiled
            else (1, 1)
        )
        tiles = _mosaic_boxes((height, width), grid, side)
        boxes = (WHOLE, *tiles) if crops > 1 else (_squared(height, width),)
        marks = _through_packing(vlm, given, (height, width), crops, grid, rows)
        packed.append(_read_marks(marks, grid, rows, first, crops, boxes, (height, width)))
        first += crops
    return packed


def _through_packing(
    vlm: Any, given: Mapping[str, Any], size: tuple[int, int], crops: int, grid: tuple[int, int], rows: int
) -> torch.Tensor:
    """Numbered patches after the model's own packing: picture, row and column of each token, ``[n, 3]``.

    Rows and columns stay right also where the model shrinks the mosaic: bilinear interpolation maps a ramp to a ramp.
    """
    cells = raster(rows, rows).double()
    numbered = torch.zeros(crops, rows * rows, 3, dtype=torch.float64)
    numbered[0, :, 1:] = cells
    for tile in range(crops - 1):
        numbered[tile + 1, :, 0] = _MOSAIC
        numbered[tile + 1, :, 1:] = cells + rows * torch.tensor([tile // grid[1], tile % grid[1]])
    newline = torch.full((3,), _NEWLINE, dtype=torch.float64)
    options: dict[str, Any] = {"image_newline": newline}
    if vlm.config.model_type == "llava_next":
        options["vision_feature_select_strategy"] = "default"
    else:
        options["vision_aspect_ratio"] = given.get("vision_aspect_ratio") or vlm.config.vision_aspect_ratio
    features, _ = vlm.pack_image_features([numbered], torch.tensor([size]), **options)
    marks: torch.Tensor = features[0]
    return marks


def _read_marks(
    marks: torch.Tensor,
    grid: tuple[int, int],
    rows: int,
    first: int,
    crops: int,
    boxes: tuple[Box, ...],
    size: tuple[int, int],
) -> Packed:
    newline = marks[:, 0] < (_NEWLINE + _BASE) / 2
    mosaic = marks[:, 0] > (_BASE + _MOSAIC) / 2  # not equality: interpolation rounds
    part = torch.where(newline, -1, mosaic.long())
    coordinates = torch.full((len(marks), 2), -1)
    coordinates[part == 0] = raster(rows, rows)
    parts = [Part((rows, rows), (0,), crops > 1)]
    patches = _neighbours(marks[:, 1:], rows, grid[1])
    patches[mosaic] += (patches[mosaic] >= 0) * rows * rows  # crop 0 is the thumbnail
    if crops > 1:
        shape = (int(newline.sum()), int(mosaic.sum()) // int(newline.sum()))
        coordinates[mosaic] = raster(*shape)
        parts.append(Part(shape, tuple(range(1, crops))))
    patches[newline] = -1
    return Packed(patches, part, coordinates, tuple(parts), first, crops, raster(rows, rows), boxes, size)


def _neighbours(places: torch.Tensor, rows: int, tiles: int) -> torch.Tensor:
    """Patches around fractional ``places [n, 2]``: 1 where a place is whole, up to 4 otherwise; ``[n, 1 or 4]``.

    Args:
        places: row and column over all tiles.
        rows: patches on a side of a tile.
        tiles: tiles in a row.
    """
    low, high = (places + 1e-4).floor().long(), (places - 1e-4).ceil().long()
    found = []
    for row in (low[:, 0], high[:, 0]):
        for column in (low[:, 1], high[:, 1]):
            tile = row.div(rows, rounding_mode="floor") * tiles + column.div(rows, rounding_mode="floor")
            found.append(tile * rows * rows + row % rows * rows + column % rows)
    patches = torch.stack(found, dim=1)
    patches[:, 2:][low[:, 0] == high[:, 0]] = -1
    patches[:, 1::2][low[:, 1] == high[:, 1]] = -1
    return patches if bool((patches[:, 1:] >= 0).any()) else patches[:, :1]


def _mosaic_boxes(size: tuple[int, int], grid: tuple[int, int], side: int) -> list[Box]:
    """What each tile shows: the picture is scaled to fit ``grid`` tiles and padded evenly on both sides."""
    height, width = size
    rows, columns = grid
    scale = min(columns * side / width, rows * side / height)
    new_height = min(-int(-height * scale // 1), rows * side)
    new_width = min(-int(-width * scale // 1), columns * side)
    top, left = (rows * side - new_height) // 2, (columns * side - new_width) // 2
    return [
        (
            (column * side - left) / new_width,
            (row * side - top) / new_height,
            ((column + 1) * side - left) / new_width,
            ((row + 1) * side - top) / new_height,
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _squared(height: int, width: int) -> Box:
    """What a crop shows when the picture was padded to a square around its middle."""
    across, down = (max(height, width) / width - 1) / 2, (max(height, width) / height - 1) / 2
    return (-across, -down, 1 + across, 1 + down)


def _pack_video(vlm: Any, given: Mapping[str, Any]) -> list[Packed]:
    """LLaVA-OneVision: frames pooled to half their side, one newline at the end of the video."""
    videos, frames = given["pixel_values_videos"].shape[:2]
    rows = vlm.config.vision_config.image_size // vlm.config.vision_config.patch_size
    numbered = raster(rows, rows).double().unsqueeze(0)
    pooled = vlm.apply_pooling(numbered)[0]  # the same in every frame
    side = round(len(pooled) ** 0.5)
    patches = _neighbours(pooled, rows, 1)
    patches = torch.cat(
        [torch.where(patches < 0, patches, patches + frame * rows * rows) for frame in range(frames)]
    )
    patches = torch.cat((patches, patches.new_full((1, patches.shape[1]), -1)))
    grid = (int(frames), side, side)
    coordinates = torch.cat((raster(*grid), torch.full((1, 3), -1)))
    part = torch.zeros(len(patches)).long()
    part[-1] = -1
    return [
        Packed(
            patches,
            part,
            coordinates,
            (Part(grid, tuple(range(frames))),),
            video * frames,
            int(frames),
            raster(rows, rows),
            (WHOLE,) * frames,
            video=True,
        )
        for video in range(int(videos))
    ]
