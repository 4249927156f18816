"""How pictures become visual tokens: what one encoder call made, token by token.

Every architecture arranges the encoder's patches in its own way before the language model sees them: crops are put
side by side and padding is cut off, neighbouring patches are merged, newline tokens are added. A *packer* (one per
architecture family, registered in its anatomy) tells for each visual token which patches it was made from. Where the
model has code for the arrangement, the packer sends numbered patches through that very code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the picture's width and height; outside of 0..1 where padding was added."""


@dataclass(frozen=True)
class Part:
    """Tokens of one picture that form a grid: a whole picture, its thumbnail, one tile, or tiles joined to a mosaic.

    Attributes:
        grid: ``(rows, columns)`` of tokens; ``(frames, rows, columns)`` of a video.
        crops: numbers (within the picture) of the crops it was made from.
        thumbnail: it shows the whole picture once more, beside its tiles.
    """

    grid: tuple[int, ...]
    crops: tuple[int, ...]
    thumbnail: bool = False


@dataclass(frozen=True)
class Packed:
    """The visual tokens of one picture or video, as the language model gets them.

    A *crop* is one sequence of the encoder: the picture, a tile, a frame. All crops of a picture have the same number
    of patches ``P`` (prefix tokens such as ``[CLS]`` not counted).

    Attributes:
        patches: patches each token was made from, ``[n, k]``: ``crop * P + patch``, with crops counted within the
            picture; -1 fills up, and a row of -1 is a token without patches (newline).
        part: index into ``parts``, ``[n]``; -1 = newline.
        coordinates: place in the grid of its part, ``[n, 2]`` (row, column) or ``[n, 3]`` (frame, row, column);
            -1 = newline.
        parts: the grids.
        first_crop: number of this picture's first crop within the encoder call.
        crops: number of crops.
        patch_coordinates: row and column of each patch of a crop, in the encoder's order, ``[P, 2]``.
        boxes: what each crop shows of the picture; ``None`` when the model is not told.
        size: height and width of the picture before any preprocessing, when the model is told.
        video: the picture is a video.
    """

    patches: torch.Tensor
    part: torch.Tensor
    coordinates: torch.Tensor
    parts: tuple[Part, ...]
    first_crop: int
    crops: int
    patch_coordinates: torch.Tensor
    boxes: tuple[Box, ...] | None = None
    size: tuple[int, int] | None = None
    video: bool = False

    @property
    def length(self) -> int:
        """Number of tokens, ``n``."""
        return len(self.part)


@dataclass(frozen=True)
class Placeholders:
    """Where one kind of visual token (image or video) stands in a batch of prompts.

    Attributes:
        ids: token ids, ``[B, L]``.
        mask: which of them are placeholders, ``[B, L]``.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def runs(self, sample: int) -> list[tuple[int, int]]:
        """Start and length of each unbroken run of placeholders in one sample."""
        places = self.mask[sample].nonzero().squeeze(-1).tolist()
        runs: list[tuple[int, int]] = []
        for place in places:
            if runs and place == sum(runs[-1]):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((place, 1))
        return runs


Packer = Callable[[Any, str, Mapping[str, Any], Placeholders], list[Packed]]
"""``(vlm, "image" or "video", arguments of get_*_features, placeholders)`` to pictures, in the order of features."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def raster(*grid: int) -> torch.Tensor:
    """Coordinates of a grid in row-major order, ``[cells, len(grid)]``."""
    return torch.stack(torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij"), -1).flatten(
        0, -2
    )


def parallel_parts(
    patches: torch.Tensor,
    grid: tuple[int, int],
    first_crop: int,
    patch_coordinates: torch.Tensor,
    boxes: tuple[Box, ...] | None,
) -> Packed:
    """A picture whose crops stay apart: one part per crop, the last of several crops being the thumbnail.

    Args:
        patches: of each crop's tokens, ``[crops, q, k]``, numbered ``crop * P + patch``.
        grid: ``(rows, columns)`` of the ``q`` tokens of a crop.
        first_crop: see :class:`Packed`.
        patch_coordinates: see :class:`Packed`.
        boxes: see :class:`Packed`.
    """
    crops, tokens = patches.shape[:2]
    return Packed(
        patches=patches.flatten(0, 1),
        part=torch.arange(crops).repeat_interleave(tokens),
        coordinates=raster(*grid).repeat(crops, 1),
        parts=tuple(Part(grid, (crop,), crops > 1 and crop == crops - 1) for crop in range(crops)),
        first_crop=first_crop,
        crops=crops,
        patch_coordinates=patch_coordinates,
        boxes=boxes,
    )


def tile_boxes(pixels: torch.Tensor) -> tuple[Box, ...]:
    """What each crop shows when a picture was cut into a regular grid of tiles, followed by a thumbnail.

    The model is told the number of tiles, not how many are in a row: the arrangement is the one whose mosaic looks
    most like the thumbnail.

    Args:
        pixels: crops of one picture, ``[crops, C, H, W]``; a single crop is the picture itself.
    """
    tiles, thumbnail = pixels[:-1].float(), pixels[-1:].float()
    if not len(tiles):
        return (WHOLE,)
    side = min(16, *pixels.shape[-2:])
    target = torch.nn.functional.adaptive_avg_pool2d(thumbnail, side)
    best: tuple[float, int, int] | None = None
    for rows in (rows for rows in range(1, len(tiles) + 1) if len(tiles) % rows == 0):
        columns = len(tiles) // rows
        mosaic = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        error = float((torch.nn.functional.adaptive_avg_pool2d(mosaic[None], side) - target).square().mean())
        if best is None or error < best[0]:
            best = (error, rows, columns)
    assert best is not None
    _, rows, columns = best
    boxes = [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    return (*boxes, WHOLE)
