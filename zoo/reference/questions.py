"""Questions about a canvas on six abilities, each with one exact answer.

==============  ==========================================  ==========================
ability         question                                    answer
==============  ==========================================  ==========================
recognition     What is at the top left?                    a name of a picture
position        Where is the cat seen from the dog?         left, right, above, below
counting        How many cats? How many pictures?           a number, as a word
existence       Is there a ship?                            yes, no (evenly)
digits          Read the digits.                            3 to 6 digits
compare         Are the left and the top the same?          yes, no (evenly)
                Are there more cats than dogs?              yes, no (evenly)
==============  ==========================================  ==========================

A question is only asked where its answer cannot be disputed: a place is named when one picture, and only one, is
clearly there; two pictures are compared by direction when one direction clearly prevails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import TypeVar

import numpy as np

from zoo.reference.canvases import DIGITS, NAMES, SIDE, THINGS, Box, Canvas, Picture

T = TypeVar("T")

_COLUMNS, _ROWS = ("left", "", "right"), ("top", "", "bottom")
_CLEAR = SIDE / 28
"""How far, in pixels, the middle of a picture must be from the border between two named places."""
_PREVAILS = 1.5
"""How many times further apart two pictures must be in the direction that is named than in the other one."""
_PLURALS = {
    "trousers": "trousers",
    "dress": "dresses",
    "six": "sixes",
    "deer": "deer",
}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        ability: one of ``ABILITIES``.
        text: what is asked.
        answer: one word, or a row of digits.
        regions: where on the canvas one has to look; empty = everywhere.
    """

    ability: str
    text: str
    answer: str
    regions: tuple[Box, ...] = ()


def questions(canvas: Canvas, random: np.random.Generator) -> list[Question]:
    """All kinds of questions that the canvas allows, in random order; at most a few of each ability."""
    asked = [question for ask in _ABILITIES.values() for question in ask(canvas, random)]
    return [asked[place] for place in random.permutation(len(asked))]


def overview(canvas: Canvas) -> Question | None:
    """All names with their places, row by row: an exercise for training, not an ability."""
    placed = [(picture.box.centre[1], picture.name, place) for place, picture in _places(canvas).items()]
    if not placed:
        return None
    text = ", ".join(f"{name} {place}" for _, name, place in sorted(placed))
    return Question("overview", "What is where?", text)


def _recognition(canvas: Canvas, random: np.random.Generator) -> Iterator[Question]:
    for place, picture in _some(list(_places(canvas).items()), 3, random):
        yield Question("recognition", f"What is at the {place}?", picture.name, (picture.box,))


def _position(canvas: Canvas, random: np.random.Generator) -> Iterator[Question]:
    counts = Counter(picture.name for picture in canvas.pictures)
    single = [picture for picture in canvas.pictures if counts[picture.name] == 1]
    pairs = [(one, other, _direction(one.box, other.box)) for one, other in permutations(single, 2)]
    for one, other, direction in _some([pair for pair in pairs if pair[2]], 2, random):
        text = f"Where is the {one.name} seen from the {other.name}?"
        yield Question("position", text, direction, (one.box, other.box))


def _counting(canvas: Canvas, random: np.random.Generator) -> Iterator[Question]:
    if not canvas.digits:
        yield Question("counting", "How many pictures?", DIGITS[len(canvas.pictures)])
    counts = Counter(picture.name for picture in canvas.pictures)
    repeated = [name for name, count in counts.items() if count > 1]
    # Where something is there several times it is asked for: "one" would be the answer too often.
    for name in _some(repeated or list(counts), 1, random):
        yield Question("counting", f"How many {plural(name)}?", DIGITS[counts[name]])


def _existence(canvas: Canvas, random: np.random.Generator) -> Iterator[Question]:
    present = sorted({picture.name for picture in canvas.pictures})
    absent = [name for name in (THINGS if canvas.digits else NAMES) if name not in present]
    if not present:
        return
    for _ in range(2):
        there = random.random() < 0.5
        name = _some(present if there else absent, 1, random)[0]
        yield Question("existence", f"Is there {_article(name)} {name}?", "yes" if there else "no")


def _digits(canvas: Canvas, random: np.random.Generator) -> Iterator[Question]:
    if canvas.strip is not None:
        yield Question("digits", "Read the digits.", canvas.digits, (canvas.strip,))


def _compare(canvas: Canvas, random: np.random.Generator) -> Iterator[Question]:
    pairs = list(combinations(_places(canvas).items(), 2))
    alike = [pair for pair in pairs if pair[0][1].name == pair[1][1].name]
    unlike = [pair for pair in pairs if pair not in alike]
    # Only canvases with both kinds of pairs are asked about, so that what else is on them gives nothing away.
    if alike and unlike:
        same = random.random() < 0.5
        (one, first), (other, second) = _some(alike if same else unlike, 1, random)[0]
        text = f"Are the {one} and the {other} the same?"
        yield Question("compare", text, "yes" if same else "no", (first.box, second.box))
    counts = Counter(picture.name for picture in canvas.pictures)
    uneven = [pair for pair in combinations(sorted(counts), 2) if counts[pair[0]] != counts[pair[1]]]
    for pair in _some(uneven, 1, random):
        one, other = _some(list(pair), 2, random)
        answer = "yes" if counts[one] > counts[other] else "no"
        yield Question("compare", f"Are there more {plural(one)} than {plural(other)}?", answer)


_ABILITIES: dict[str, Callable[[Canvas, np.random.Generator], Iterator[Question]]] = {
    "recognition": _recognition,
    "position": _position,
    "counting": _counting,
    "existence": _existence,
    "digits": _digits,
    "compare": _compare,
}
ABILITIES = tuple(_ABILITIES)


def plural(name: str) -> str:
    """``cats``, ``dresses``, ``deer`` ..."""
    return _PLURALS.get(name, f"{name}s")


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" and name != "one" else "a"


def _places(canvas: Canvas) -> dict[str, Picture]:
    """Pictures by the name of their place, where that name says which picture is meant."""
    found: dict[str, list[Picture]] = {}
    vague = set[str]()
    for picture in canvas.pictures:
        near = _cells(picture.box)
        for name in near:
            found.setdefault(name, []).append(picture)
        vague |= near if len(near) > 1 else set()
    return {name: pictures[0] for name, pictures in found.items() if len(pictures) == 1 and name not in vague}


def _cells(box: Box) -> set[str]:
    """Names of the places that the middle of a box is in, or so close to that one may doubt it."""
    columns, rows = (
        {int(np.clip((middle + shift) * 3 // SIDE, 0, 2)) for shift in (-_CLEAR, _CLEAR)}
        for middle in box.centre
    )
    return {f"{_ROWS[row]} {_COLUMNS[column]}".strip() or "center" for row in rows for column in columns}


def _direction(one: Box, seen_from: Box) -> str:
    """Where ``one`` is; empty when no direction prevails."""
    (x, y), (x0, y0) = one.centre, seen_from.centre
    right, down = x - x0, y - y0
    if abs(right) >= _PREVAILS * abs(down):
        return "right" if right > 0 else "left"
    if abs(down) >= _PREVAILS * abs(right):
        return "below" if down > 0 else "above"
    return ""


def _some(items: list[T], count: int, random: np.random.Generator) -> list[T]:
    """Up to ``count`` different items, in random order."""
    return [items[place] for place in random.permutation(len(items))[:count]]
