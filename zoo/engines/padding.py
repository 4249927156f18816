"""Which parts of a picture are padding that made it square."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.engines.images import ImageView
from zoo.engines.views import View

_SAME = 0.02
"""Largest difference of normalised pixels of one colour (a level of 8-bit pixels is about 0.015)."""


def covers_padding(width: int, height: int, grid: int) -> torch.Tensor:
    """Share of padding in the cells of a grid over a picture padded to a square around its middle.

    Args:
        width: of the picture before padding.
        height: likewise.
        grid: cells per side.

    Returns:
        ``[grid, grid]`` float32.
    """
    side = max(width, height)

    def shown(length: int) -> torch.Tensor:
        """Share of each cell, along one direction, that lies on the picture."""
        margin = (side - length) / (2 * side) * grid
        edges = torch.arange(grid + 1, dtype=torch.float64).clamp(margin, grid - margin)
        return edges.diff()

    return (1 - shown(height).unsqueeze(1) * shown(width)).float()


def touches_padding(width: int, height: int, grid: int) -> torch.Tensor:
    """The same in whole cells: 1 outside of a margin of ``(grid - int(short * grid / long)) // 2`` cells, else 0."""
    short, long = sorted((width, height))
    margin = (grid - int(short * grid / long)) // 2
    along = torch.zeros(grid)
    along[:margin] = along[grid - margin :] = 1
    across = torch.zeros(grid)
    rows, columns = (across, along) if width < height else (along, across)
    return torch.maximum(rows.unsqueeze(1), columns)


def shape_of_content(image: ImageView) -> tuple[int, int] | None:
    """Width and height of a picture that was padded to a square, in any unit; ``None`` when it was not.

    Where the model is not told the size of the picture, padding is recognised by its look: an even margin of one
    colour on two opposite sides.
    """
    if image.crops != 1 or image.video:
        return None
    if image.boxes is not None:
        left, top, right, bottom = image.boxes[0]
        padded = right - left > 1 or bottom - top > 1
        return (image.size[1], image.size[0]) if padded and image.size is not None else None
    side = int(image.patch_coordinates.max()) + 1
    if len(image.patch_coordinates) != side * side:
        return None
    patches = image.patch_pixels()[0].float()  # [P, C, p, p]
    cells = patches.new_empty(side, side, *patches.shape[1:])
    cells[tuple(image.patch_coordinates.T)] = patches
    picture = cells.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # [C, S, S]
    even = ((picture - picture[:, :1, :1]).abs() <= _SAME).all(0)
    size, margins = len(even), []
    for lines in (even.all(0), even.all(1)):  # columns, rows
        other = (~lines).nonzero().flatten().tolist()
        margins.append((other[0], size - 1 - other[-1]) if other else (0, 0))
    (left, right), (top, bottom) = ((a, b) if abs(a - b) <= 1 else (0, 0) for a, b in margins)
    if bool(left or right) == bool(top or bottom):
        return None
    return size - left - right, size - top - bottom


def on_padding(view: View, padded: Callable[[int, int, int], torch.Tensor]) -> torch.Tensor:
    """Visual tokens that lie on padding, ``[N]`` bool.

    Args:
        view: of one sample.
        padded: from the width and height of a picture before padding, and the cells per side of a grid over the padded
            one, to 1 for cells that count as padding, ``[grid, grid]`` float32.
    """
    found = torch.zeros_like(view.index, dtype=torch.bool)
    for image in view.images:
        shape = shape_of_content(image)
        if shape is None:
            continue
        cells = padded(*shape, int(image.patch_coordinates.max()) + 1)[tuple(image.patch_coordinates.T)]
        # A token of several patches goes with the majority of them.
        found[image.tokens] = image.on_tokens(cells.to(view.tokens.device).unsqueeze(0)) > 0.5
    return found
