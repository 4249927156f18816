"""Canvases: real pictures at random places and sizes, so that every question about them has an exact answer.

A canvas is a square of 112 pixels in one colour that carries two to six pictures of CIFAR-10, Fashion-MNIST and MNIST,
or a strip of three to six handwritten digits with up to two pictures beside it. Nothing overlaps. Pictures for training
come from the training parts of the three sets, those for evaluation from the test parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from zoo.image_data import ImageSplit, labelled

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

SIDE = 112
"""Pixels on a side of a canvas."""
SIZES = (32, 60)
"""Smallest and largest side of a picture."""
PICTURES = (2, 6)
STRIP_DIGITS = (3, 6)
BESIDE_STRIP = 2
"""Pictures beside a strip, at most: there is no room for more."""
REPEATS = 0.35
"""How often a picture shows what an earlier one on the canvas shows, too."""
STRIPS = 0.5
"""How many of the canvases have a strip, unless it is said."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CIFAR = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Pullovers and shirts are left out: at this size people, too, take them for coats and T-shirts.
_FASHION = {0: "shirt", 1: "trousers", 3: "dress", 4: "coat", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot"}
THINGS = (*_CIFAR, *_FASHION.values())
"""What pictures show, digits aside."""
NAMES = (*THINGS, *DIGITS)
"""All names of pictures."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; right and bottom edge are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def centre(self) -> tuple[float, float]:
        """Horizontal and vertical place of the middle, in pixels."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def overlaps(self, other: Box) -> bool:
        """Whether the two share a pixel."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


@dataclass(frozen=True)
class Picture:
    """One picture on a canvas."""

    name: str
    box: Box


@dataclass(frozen=True)
class Canvas:
    """What is shown, and where.

    Attributes:
        pixels: RGB, uint8 ``[SIDE, SIDE, 3]``.
        pictures: in no order.
        digits: what the strip reads; empty = no strip.
        strip: where it is.
    """

    pixels: Pixels
    pictures: tuple[Picture, ...]
    digits: str = ""
    strip: Box | None = None


@cache
def _library(split: ImageSplit) -> dict[str, Pixels]:
    """All pictures by name, ``[N, H, W, 3]``."""
    cifar, fashion, mnist = (labelled(name, split) for name in ("cifar10", "fashion-mnist", "mnist"))
    found = {name: cifar.images[cifar.labels == label] for label, name in enumerate(_CIFAR)}
    found |= {name: fashion.images[fashion.labels == label] for label, name in _FASHION.items()}
    return found | {name: mnist.images[mnist.labels == label] for label, name in enumerate(DIGITS)}


def paint(split: ImageSplit, seed: int, strip: bool | None = None) -> Canvas:
    """The canvas number ``seed`` of a split: the same number gives the same canvas.

    Args:
        split: ``train`` or ``test``; canvases of the two share no picture.
        seed: which one.
        strip: with or without a strip of digits; ``None`` = ``STRIPS`` of them have one.

    Raises:
        DownloadFailed: the pictures could not be fetched.
    """
    random = np.random.default_rng((seed, int(split == "test")))
    library = _library(split)
    pixels = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:] = random.integers(0, 256, 3)
    has_strip = random.random() < STRIPS if strip is None else strip
    digits, taken = "", list[Box]()
    if has_strip:
        digits, box = _strip(pixels, library, random)
        taken.append(box)
    # A single digit beside a strip would make "is there a seven?" ambiguous.
    names = THINGS if has_strip else NAMES
    wanted = random.integers(0, BESIDE_STRIP + 1) if has_strip else random.integers(*PICTURES, endpoint=True)
    pictures = list[Picture]()
    for _ in range(wanted):
        if pictures and random.random() < REPEATS:
            name = pictures[random.integers(len(pictures))].name
        else:
            name = names[random.integers(len(names))]
        place = _free_place(taken, random)
        _draw(pixels, library[name][random.integers(len(library[name]))], place)
        taken.append(place)
        pictures.append(Picture(name, place))
    return Canvas(pixels, tuple(pictures), digits, taken[0] if has_strip else None)


def _strip(pixels: Pixels, library: dict[str, Pixels], random: np.random.Generator) -> tuple[str, Box]:
    """Draw a strip of digits, as large as the width allows; returns what it reads, and where it is."""
    count = int(random.integers(*STRIP_DIGITS, endpoint=True))
    side = min(SIDE // count, 32)
    left = int(random.integers(0, SIDE - count * side + 1))
    top = int(random.integers(0, SIDE - side + 1))
    values = random.integers(0, 10, count)
    for number, value in enumerate(values):
        digits = library[DIGITS[value]]
        place = Box(left + number * side, top, left + (number + 1) * side, top + side)
        _draw(pixels, digits[random.integers(len(digits))], place)
    return "".join(map(str, values)), Box(left, top, left + count * side, top + side)


def _free_place(taken: list[Box], random: np.random.Generator) -> Box:
    """A square that touches nothing: of random size, smaller when there is no room.

    Six squares of the smallest size leave no room for a seventh only in arrangements that a few hundred tries avoid;
    where all tries fail, the whole canvas is searched.
    """
    smallest, largest = SIZES
    for attempt in range(200):
        size = int(random.integers(smallest, max(smallest, largest - attempt // 4) + 1))
        left, top = (int(edge) for edge in random.integers(0, SIDE - size + 1, 2))
        place = Box(left, top, left + size, top + size)
        if not any(place.overlaps(other) for other in taken):
            return place
    covered = np.zeros(
        (SIDE + 1, SIDE + 1), dtype=int
    )  # its sums from the corner tell how much a square covers
    for box in taken:
        covered[box.top + 1 : box.bottom + 1, box.left + 1 : box.right + 1] = 1
    sums = covered.cumsum(0).cumsum(1)
    for size in range(smallest, 0, -1):
        inside = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
        for top, left in np.argwhere(inside == 0)[:1].tolist():
            return Box(left, top, left + size, top + size)
    raise AssertionError("a canvas of a few pictures has a free pixel")


def _draw(pixels: Pixels, picture: Pixels, place: Box) -> None:
    from PIL import Image

    size = (place.right - place.left, place.bottom - place.top)
    scaled = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    pixels[place.top : place.bottom, place.left : place.right] = np.asarray(scaled)
