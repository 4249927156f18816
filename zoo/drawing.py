"""Parts that pictures of results are put together from: pixels as they were, captions, lines of images, a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1480
"""Of a page, in pixels; what is wider goes on in the next line."""
GAP, LINE = 12, 20
PAPER, INK, SOFT = (22, 25, 28), (236, 234, 228), (163, 171, 178)


def natural(pixels: torch.Tensor, processor: Any, video: bool) -> torch.Tensor:
    """Normalised pixels ``[..., 3, p, p]`` back in 0..1; stretched to it when it is not known how they were made."""
    source = getattr(processor, "video_processor" if video else "image_processor", processor)
    mean, std = getattr(source, "image_mean", None), getattr(source, "image_std", None)
    if mean is None or std is None or not getattr(source, "do_normalize", True):
        low, high = pixels.min(), pixels.max()
        return (pixels - low) / (high - low).clamp(min=1e-6)
    shape = (-1, 1, 1)
    return (pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def titled(title: str, legend: str, body: Image.Image) -> Image.Image:
    """A page: ``title`` and ``legend`` above ``body``."""
    page = Image.new("RGB", (body.width + 2 * GAP, body.height + 2 * GAP + 3 * LINE), PAPER)
    pen = ImageDraw.Draw(page)
    room = body.width
    write(pen, (GAP, GAP), title, 17, INK, room)
    write(pen, (GAP, GAP + LINE + 4), legend, 13, SOFT, room)
    page.paste(body, (GAP, GAP + 3 * LINE - 4))
    return page


def captioned(first: str, second: str, image: Image.Image) -> Image.Image:
    """``image`` under two lines of text."""
    cell = Image.new("RGB", (max(image.width, 264), image.height + 2 * LINE), PAPER)
    pen = ImageDraw.Draw(cell)
    write(pen, (0, 0), first, 15, INK, cell.width)
    write(pen, (0, LINE - 1), second, 13, SOFT, cell.width)
    cell.paste(image, (0, 2 * LINE))
    return cell


def flow(images: Sequence[Image.Image], width: int, gap: int = GAP) -> Image.Image:
    """Images from left to right, in as many lines as ``width`` asks for."""
    places, x, y, line = [], 0, 0, 0
    for image in images:
        if x and x + image.width > width:
            x, y, line = 0, y + line + gap, 0
        places.append((x, y))
        x, line = x + image.width + gap, max(line, image.height)
    size = [
        max(place[axis] + image.size[axis] for place, image in zip(places, images, strict=True))
        for axis in (0, 1)
    ]
    page = Image.new("RGB", (size[0], size[1]), PAPER)
    for place, image in zip(places, images, strict=True):
        page.paste(image, place)
    return page


def write(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    room: int,
) -> None:
    """One line of text, cut off with dots where it does not fit."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    if pen.textlength(text, font=font) > room:
        while text and pen.textlength(f"{text}...", font=font) > room:
            text = text[:-1]
        text += "..."
    pen.text(at, text, fill=colour, font=font)
