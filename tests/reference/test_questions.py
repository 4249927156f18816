from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from zoo.reference.canvases import DIGITS, SIDE, Box, Canvas, Picture, paint
from zoo.reference.questions import ABILITIES, overview, plural, questions

BLANK = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)


def scene(**boxes: tuple[int, int]) -> Canvas:
    """Pictures of 20 pixels by name (a number behind it tells repeats apart), given by their middles."""
    pictures = [
        Picture(name.rstrip("0123456789"), Box(x - 10, y - 10, x + 10, y + 10))
        for name, (x, y) in boxes.items()
    ]
    return Canvas(BLANK, tuple(pictures))


def asked(canvas: Canvas, ability: str) -> dict[str, str]:
    """All questions of an ability that ever come up, with their answers."""
    found: dict[str, str] = {}
    for seed in range(60):
        for question in questions(canvas, np.random.default_rng(seed)):
            if question.ability == ability:
                assert found.setdefault(question.text, question.answer) == question.answer
    return found


def test_places_are_named_where_one_picture_clearly_is() -> None:
    canvas = scene(cat=(15, 15), dog=(56, 95), ship1=(95, 50), ship2=(95, 64))
    assert asked(canvas, "recognition") == {
        "What is at the top left?": "cat",
        "What is at the bottom?": "dog",
    }
    assert asked(scene(cat=(37, 15)), "recognition") == {}, "between left and middle"


def test_directions_are_those_of_the_first_picture_seen_from_the_second() -> None:
    canvas = scene(cat=(15, 20), dog=(90, 30), ship=(20, 90))
    assert asked(canvas, "position") == {
        "Where is the cat seen from the dog?": "left",
        "Where is the dog seen from the cat?": "right",
        "Where is the cat seen from the ship?": "above",
        "Where is the ship seen from the cat?": "below",
    }, "dog and ship are as far apart in one direction as in the other"


def test_counts() -> None:
    canvas = scene(dress1=(15, 15), dress2=(90, 15), dress3=(15, 90), six=(90, 90))
    assert asked(canvas, "counting") == {"How many pictures?": "four", "How many dresses?": "three"}
    assert plural("deer") == "deer"


def test_existence_is_balanced_and_true() -> None:
    answers = Counter[str]()
    for seed in range(400):
        canvas = paint("train", seed, False)
        names = {picture.name for picture in canvas.pictures}
        for question in questions(canvas, np.random.default_rng(seed)):
            if question.ability == "existence":
                name = question.text.removesuffix("?").split()[-1]
                assert question.answer == ("yes" if name in names else "no")
                answers[question.answer] += 1
    assert 0.45 < answers["yes"] / answers.total() < 0.55


def test_comparisons_are_balanced_and_true() -> None:
    answers = {"same": Counter[str](), "more": Counter[str]()}
    for seed in range(600):
        canvas = paint("train", seed, False)
        counts = Counter(plural(picture.name) for picture in canvas.pictures)
        for question in questions(canvas, np.random.default_rng(seed)):
            if question.ability != "compare":
                continue
            if question.text.startswith("Are there more"):
                one, other = question.text.removeprefix("Are there more ").removesuffix("?").split(" than ")
                assert question.answer == ("yes" if counts[one] > counts[other] else "no")
                answers["more"][question.answer] += 1
            else:
                names = {picture.name for picture in canvas.pictures if picture.box in question.regions}
                assert len(question.regions) == 2
                assert question.answer == ("yes" if len(names) == 1 else "no")
                answers["same"][question.answer] += 1
    for counted in answers.values():
        assert 0.42 < counted["yes"] / counted.total() < 0.58


def test_digits_are_asked_of_strips_only() -> None:
    strip = paint("train", 3, True)
    (question,) = asked(strip, "digits").items()
    assert question == ("Read the digits.", strip.digits)
    assert asked(paint("train", 3, False), "digits") == {}
    assert not {name for name in DIGITS if any(name in text for text in asked(strip, "existence"))}


def test_the_overview_goes_row_by_row() -> None:
    canvas = scene(dog=(56, 95), cat=(15, 15))
    whole = overview(canvas)
    assert whole is not None
    assert whole.answer == "cat top left, dog bottom"
    assert overview(Canvas(BLANK, ())) is None


@pytest.mark.parametrize("ability", ABILITIES)
def test_every_ability_comes_up(ability: str) -> None:
    found = [
        question
        for number in range(60)
        for question in questions(paint("train", number), np.random.default_rng(number))
        if question.ability == ability
    ]
    assert len(found) >= 5
