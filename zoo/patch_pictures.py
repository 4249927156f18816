"""Pictures of what encoder-token methods leave: each token drawn as the average of the patches that went into it.

One forward pass is watched (:func:`record_patches`), and drawn on the pixels that the encoder was given
(:func:`draw_patches`), beside the number of tokens that reached each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from zoo.drawing import INK, LINE, PAPER, SOFT, WIDTH, captioned, flow, natural, titled, write
from zoo.errors import BadInput
from zoo.families.encoder_tokens import AppliedEncoder
from zoo.interface import Applied, AppliedStack


@dataclass(frozen=True)
class PatchMap:
    """What became of the patches of one picture.

    Attributes:
        pixels: of every patch, in 0..1, ``[rows, columns, 3, p, p]``.
        shares: how much of each patch is in each token that is left, ``[K, rows * columns]``.
        lengths: tokens that reached the attention of each block, [CLS] and other prefix tokens included.
        total: tokens before any reduction, likewise.
    """

    pixels: torch.Tensor
    shares: torch.Tensor
    lengths: list[int]
    total: int

    @property
    def dropped(self) -> torch.Tensor:
        """Patches that are in no token, ``[rows, columns]`` bool."""
        return (self.shares.sum(0) == 0).view(self.pixels.shape[:2])

    @property
    def owner(self) -> torch.Tensor:
        """The token that holds most of each patch, ``[rows, columns]``; -1 = none."""
        largest = self.shares.argmax(0).view(self.pixels.shape[:2])
        return torch.where(self.dropped, -1, largest)

    def averages(self) -> torch.Tensor:
        """Each patch as the average of what its token holds, ``[rows, columns, 3, p, p]``; zeros where it left.

        A patch that was shared out is the mean of the tokens it went into, weighted with its shares.
        """
        tiny = torch.finfo(self.shares.dtype).tiny
        patches = self.pixels.flatten(0, 1).flatten(1)
        tokens = self.shares / self.shares.sum(1, keepdim=True).clamp(min=tiny) @ patches
        back = (self.shares / self.shares.sum(0).clamp(min=tiny)).T @ tokens
        return back.view(self.pixels.shape)


def record_patches(applied: Applied, **inputs: Any) -> list[PatchMap]:
    """Run one forward pass and say what became of the patches of each picture.

    Args:
        applied: an encoder-token method at work on a vision encoder, or a stack with one.
        inputs: of the model, ``pixel_values [B, 3, H, W]`` among them.

    Raises:
        BadInput: no encoder-token method is at work, or the pixels are not one picture per sample.
    """
    layers = applied.layers if isinstance(applied, AppliedStack) else [applied]
    encoders = [layer for layer in layers if isinstance(layer, AppliedEncoder)]
    pixels = inputs.get("pixel_values")
    if not encoders or pixels is None or pixels.dim() != 4:
        raise BadInput(f"{applied.method.name} has no patches of single pictures to draw")
    (watched,) = encoders
    with torch.no_grad():
        applied(**inputs)
    side = watched.reducer.encoder.patch_size
    given = natural(pixels.float().cpu(), applied.loaded.processor, video=False)
    grid = given.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    shares = watched.reducer.patch_sources.cpu()
    return [
        PatchMap(patches, share, watched.tokens_per_block, watched.reducer.entered)
        for patches, share in zip(grid, shares, strict=True)
    ]


_SIDE = 360
"""Longer side of a picture, in pixels."""
_BAR, _TALL = 28, 260
"""Width of the bar of a block with the gap behind it, and height of a bar that keeps all tokens, in pixels."""
_KEPT, _GONE = (255, 210, 63), (52, 58, 64)


def draw_patches(found: PatchMap, title: str) -> Image.Image:
    """The picture as the encoder got it, what its tokens hold at the end, and the tokens of each block.

    Args:
        found: of one picture.
        title: what stands above, such as the method and the model.
    """
    count = found.shares.shape[1]
    cell = max(3, round(_SIDE / max(found.pixels.shape[:2])))
    left, gone = found.shares.shape[0], int(found.dropped.sum())
    ending = f"{left} tokens left of {count} patches" + (f", {gone} patches dropped" if gone else "")
    mean = sum(found.lengths) / len(found.lengths)
    body = flow(
        [
            captioned("what the encoder sees", f"{count} patches", _mosaic(found.pixels, cell)),
            captioned("what its tokens hold at the end", ending, _merged(found, cell)),
            captioned("tokens per block", f"{mean:.1f} of {found.total} on average", _bars(found)),
        ],
        WIDTH,
    )
    legend = "each patch is drawn as the average of the patches in its token"
    return titled(title, legend + " | dimmed: dropped" if gone else legend, body)


def _mosaic(patches: torch.Tensor, cell: int) -> Image.Image:
    """Patches ``[rows, columns, 3, p, p]`` in 0..1, each ``cell`` pixels wide."""
    rows, columns, _, side, _ = patches.shape
    flat = patches.permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    image = Image.fromarray((flat * 255).round().byte().numpy())
    return image.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)


def _merged(found: PatchMap, cell: int) -> Image.Image:
    owner, dropped = found.owner, found.dropped
    grey = 0.28 * found.pixels.mean(2, keepdim=True)
    drawn = torch.where(dropped[..., None, None, None], grey, found.averages())
    picture = np.array(_mosaic(drawn, cell))
    wide = owner.numpy().repeat(cell, 0).repeat(cell, 1)
    sizes = torch.bincount(owner[owner >= 0], minlength=1).numpy()
    grouped = (wide >= 0) & (sizes[wide] > 1)
    for axis in (0, 1):
        # A line between two tokens, when one of them holds several patches.
        before, after = (np.roll(one, 1, axis) for one in (wide, grouped))
        edge = (wide != before) & (grouped | after)
        edge[(slice(None),) * axis + (0,)] = False
        picture[edge] = PAPER
    return Image.fromarray(picture)


def _bars(found: PatchMap) -> Image.Image:
    """One bar per block: the tokens that reached it, out of all."""
    image = Image.new("RGB", (_BAR * len(found.lengths), _TALL + 2 * LINE), PAPER)
    pen = ImageDraw.Draw(image)
    for block, tokens in enumerate(found.lengths):
        start, stop = _BAR * block, _BAR * (block + 1) - 6
        top = LINE + _TALL - round(_TALL * tokens / found.total)
        pen.rectangle((start, LINE, stop, LINE + _TALL), fill=_GONE)
        pen.rectangle((start, top, stop, LINE + _TALL), fill=_KEPT)
        write(pen, (start, 2), str(tokens), 11, INK, _BAR)
        write(pen, (start, LINE + _TALL + 4), str(block), 11, SOFT, _BAR)
    return image
