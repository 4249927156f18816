"""What an answer says, and what it is worth: one rule per way in which public benchmarks score answers.

A rule reads the text that a model wrote (two answers are the same when they read the same, which is how loyalty
compares them) and gives it credit between 0 and 1. No rule asks another model.

Sources of the definitions: VQA accuracy, Antol et al. 2015 and the official evaluation's leave-one-out mean; ANLS,
Biten et al. 2019; relaxed accuracy, Masry et al. 2022 (ChartQA), section 5.1; substring match, Liu et al. 2023
(OCRBench). How letters and numbers are found in longer answers differs from harness to harness (reconstructed).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from zoo.suites.tables import RuleName

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}


@dataclass(frozen=True)
class Rule:
    """How answers are read, and what one is worth.

    Attributes:
        read: ``(text, choices)`` to what it says.
        credit: ``(what it says, right answers)`` to a number between 0 and 1.
    """

    read: Callable[[str, Sequence[str]], str]
    credit: Callable[[str, Sequence[str]], float]


# --- reading ----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Lower case, full-width characters as plain ones, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def bare(text: str) -> str:
    """``plain`` without punctuation around and between words."""
    return " ".join(re.sub(r"[^\w\s.,%$/-]|[.,](?!\d)", " ", plain(text)).split())


def read_letter(text: str, choices: Sequence[str]) -> str:
    """The letter of the choice that an answer names; empty when it names none, or several.

    In this order: a letter alone or at the beginning, a letter that is called the answer, the words of one choice, and
    the only letter that stands by itself.
    """
    last = chr(ord("A") + len(choices) - 1) if choices else "H"
    letters = f"[A-{last}]"
    boxed = _boxed(text)
    text = (boxed[-1] if boxed else text).strip()
    if re.fullmatch(rf"\(?{letters}\)?[.:]?", text.upper()):
        return text.strip("().:").upper()
    for pattern in (
        rf"\(?({letters})\)?[.:,)]?(?:\s*$|\n)",
        rf"\(?({letters})[.:)]\)?\s",
    ):
        found = re.match(pattern, text)
        if found:
            return found[1]
    called = re.findall(rf"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\**\s*\(?({letters})\b", text)
    if called:
        return str(called[-1])
    said = bare(text)
    named = [place for place, choice in enumerate(choices) if bare(choice) == said]
    named = named or [place for place, choice in enumerate(choices) if _holds(said, bare(choice))]
    if len(named) == 1:
        return chr(ord("A") + named[0])
    alone = set(re.findall(rf"\(({letters})\)", text))
    alone = alone or set(re.findall(rf"\b({letters})\b(?!'|\s+[a-z])", text))  # "A dog" names no choice
    return alone.pop() if len(alone) == 1 else ""


def _holds(text: str, part: str) -> bool:
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def read_yes_no(text: str, choices: Sequence[str] = ()) -> str:
    """``yes`` or ``no``: the first word, else the only one of both that occurs; empty for neither."""
    words = re.findall(r"\w+", text.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {"yes", "no"} & set(words)
    return said.pop() if len(said) == 1 else ""


def read_number(text: str, choices: Sequence[str] = ()) -> str:
    """What stands in the last ``\\boxed{}``, else the last number, else the text."""
    boxed = _boxed(text)
    if boxed:
        return plain(boxed[-1])
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else bare(text)


def _boxed(text: str) -> list[str]:
    """What stands in ``\\boxed{}``, with braces of its own at most one deep."""
    return re.findall(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", text)


def read_vqa(text: str, choices: Sequence[str] = ()) -> str:
    """Without punctuation and articles, numbers up to ten as digits."""
    return " ".join(_WORDS.get(word, word) for word in bare(text).split() if word not in _ARTICLES)


# --- credit -----------------------------------------------------------------------------------------------------------


def _number(text: str) -> float | None:
    text = text.strip().replace(",", "")
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def same_number(answer: str, expected: Sequence[str]) -> float:
    """1 when it is one of the numbers, rounded to as many digits as that has; other answers must be equal."""
    for right in expected:
        given, wanted = _number(answer), _number(right)
        if given is not None and wanted is not None:
            digits = len(right.partition(".")[2].rstrip("%"))
            if round(given, digits) == round(wanted, digits):
                return 1.0
        elif bare(answer) == bare(right):
            return 1.0
    return 0.0


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """Agreement with people: a third for each other person who said so, at most 1; the mean over persons left out."""
    people = [read_vqa(one) for one in expected]
    if len(people) == 1:
        return float(people[0] == answer)
    return fmean(
        min(1.0, sum(other == answer for other in people[:out] + people[out + 1 :]) / 3)
        for out in range(len(people))
    )


def anls(answer: str, expected: Sequence[str]) -> float:
    """Normalised Levenshtein similarity with the nearest right answer; nothing below 0.5."""
    best = 0.0
    for right in map(plain, expected):
        longest = max(len(answer), len(right))
        best = max(best, 1.0 if not longest else 1 - _distance(answer, right) / longest)
    return best if best >= 0.5 else 0.0


def _distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def relaxed(answer: str, expected: Sequence[str]) -> float:
    """A number within 5% of the right one, any other answer exactly."""
    for right in expected:
        given, wanted = _number(answer), _number(right)
        if given is not None and wanted:
            if abs(given - wanted) <= 0.05 * abs(wanted):
                return 1.0
        elif plain(answer) == plain(right):
            return 1.0
    return 0.0


def _contains(answer: str, expected: Sequence[str]) -> float:
    return float(any(plain(right) in answer for right in expected))


def _formula(answer: str, expected: Sequence[str]) -> float:
    return float(any("".join(right.split()) in answer for right in expected))


def _open(answer: str, expected: Sequence[str]) -> float:
    """One of the right answers occurs: words by themselves, numbers as numbers with two digits."""
    numbers = [_number(found) for found in re.findall(r"-?\d[\d,]*(?:\.\d+)?%?", answer)]
    for right in expected:
        wanted = _number(right)
        if wanted is not None:
            if any(one is not None and round(one, 2) == round(wanted, 2) for one in numbers):
                return 1.0
        elif _holds(bare(answer), bare(right)):
            return 1.0
    return 0.0


def _equal(answer: str, expected: Sequence[str]) -> float:
    return float(answer in expected)


def _yes_no(answer: str, expected: Sequence[str]) -> float:
    return float(answer == said_yes(expected[0]))


def said_yes(expected: str) -> str:
    """``yes`` or ``no`` for the ways in which tables write it."""
    return "yes" if expected.strip().lower().rstrip(".") in ("yes", "1", "true") else "no"


RULES: dict[RuleName, Rule] = {
    "letter": Rule(read_letter, _equal),
    "yes-no": Rule(read_yes_no, _yes_no),
    "exact": Rule(
        lambda text, _: bare(text), lambda answer, right: float(answer in [bare(one) for one in right])
    ),
    "number": Rule(read_number, same_number),
    "open": Rule(lambda text, _: plain(text), _open),
    "contains": Rule(lambda text, _: plain(text), _contains),
    "formula": Rule(lambda text, _: "".join(text.split()), _formula),
    "vqa": Rule(read_vqa, vqa_accuracy),
    "anls": Rule(lambda text, _: plain(text), anls),
    "relaxed": Rule(lambda text, _: plain(text).rstrip("."), relaxed),
}

GRADED: frozenset[RuleName] = frozenset({"vqa", "anls"})
"""Rules that give credit between right and wrong."""
