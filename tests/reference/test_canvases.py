from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from zoo.reference.canvases import DIGITS, PICTURES, SIDE, STRIP_DIGITS, THINGS, Box, paint


def test_the_same_number_gives_the_same_canvas_and_another_one_another() -> None:
    one, again, other = paint("train", 5), paint("train", 5), paint("train", 6)
    assert np.array_equal(one.pixels, again.pixels)
    assert (one.pictures, one.digits) == (again.pictures, again.digits)
    assert not np.array_equal(one.pixels, other.pixels)
    assert not np.array_equal(one.pixels, paint("test", 5).pixels)


@pytest.mark.parametrize("strip", [False, True])
def test_nothing_overlaps_or_leaves_the_canvas(strip: bool) -> None:
    seen = set()
    for number in range(150):
        canvas = paint("train", number, strip)
        boxes = [picture.box for picture in canvas.pictures] + ([canvas.strip] if canvas.strip else [])
        assert all(0 <= box.left < box.right <= SIDE and 0 <= box.top < box.bottom <= SIDE for box in boxes)
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert bool(canvas.digits) == strip
        seen.add(len(canvas.pictures))
        if strip:
            assert STRIP_DIGITS[0] <= len(canvas.digits) <= STRIP_DIGITS[1]
            assert {picture.name for picture in canvas.pictures} <= set(THINGS)
    assert seen == (set(range(3)) if strip else set(range(PICTURES[0], PICTURES[1] + 1)))


def test_a_strip_shows_the_digits_that_it_is_said_to_show(library: dict[str, np.ndarray]) -> None:
    for value, name in enumerate(DIGITS):
        library[name] = np.full_like(library[name], 20 * value)
    for number in range(20):
        canvas = paint("train", number, True)
        assert canvas.strip is not None
        size = canvas.strip.bottom - canvas.strip.top
        assert size >= 18
        for place, digit in enumerate(canvas.digits):
            shown = canvas.pixels[canvas.strip.top, canvas.strip.left + place * size]
            assert shown.tolist() == [20 * int(digit)] * 3


@pytest.mark.parametrize(
    ("other", "expected"), [((9, 9, 20, 20), True), ((10, 0, 20, 10), False), ((0, 10, 10, 11), False)]
)
def test_boxes_that_only_touch_do_not_overlap(other: tuple[int, int, int, int], expected: bool) -> None:
    assert Box(0, 0, 10, 10).overlaps(Box(*other)) is expected
