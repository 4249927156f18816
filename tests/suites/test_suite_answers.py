"""Rules: what answers say, and what they are worth, on cases made by hand."""

from __future__ import annotations

import pytest

from zoo.suites.answers import (
    RULES,
    anls,
    read_letter,
    read_number,
    read_yes_no,
    relaxed,
    same_number,
    vqa_accuracy,
)
from zoo.suites.tables import RuleName

COLOURS = ("red", "dark blue", "blue")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("b", "B"),
        ("(c).", "C"),
        ("A. red", "A"),
        ("B: because of the sky", "B"),
        ("C\nIt looks so.", "C"),
        ("The answer is (B).", "B"),
        ("I would choose option C", "C"),
        ("Red.", "A"),
        ("It is dark blue", ""),  # blue and dark blue
        ("dark blue", "B"),
        ("It must be (B) then", "B"),
        ("so \\boxed{C} it is", "C"),
        ("A dog on a bench", ""),
        ("D", ""),  # there are three choices
        ("", ""),
    ],
)
def test_the_letter_that_an_answer_names(text: str, letter: str) -> None:
    assert read_letter(text, COLOURS) == letter


def test_letters_without_known_choices() -> None:
    assert read_letter("D", ()) == "D"
    assert read_letter("Answer: H", ()) == "H"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes, it is", "yes"),
        ("no.", "no"),
        ("I think there is: yes", "yes"),
        ("nobody knows", ""),
        ("it is yes or no", ""),
    ],
)
def test_yes_and_no(text: str, said: str) -> None:
    assert read_yes_no(text) == said


@pytest.mark.parametrize(
    ("rule", "text", "expected", "credit"),
    [
        ("yes-no", "No, there is none", ("0",), 1.0),
        ("yes-no", "perhaps", ("no",), 0.0),
        ("exact", "The Cat.", ("the cat",), 1.0),
        ("exact", "cat", ("the cat",), 0.0),
        ("contains", "It says Main  Street 5", ("main street",), 1.0),
        ("contains", "Mainstreet", ("main street",), 0.0),
        ("formula", r"\frac { a } { b }", (r"\frac{a}{b}",), 1.0),
        ("formula", r"\frac{A}{b}", (r"\frac{a}{b}",), 0.0),
        ("number", "5 times 3 is 15", ("15",), 1.0),
        ("number", "so it is 1,250.04", ("1250.0",), 1.0),
        ("number", r"thus \boxed{\frac{1}{2}}, not 7", (r"\frac{1}{2}",), 1.0),
        ("open", "about 3.14 metres", ("3.14", "pi"), 1.0),
        ("open", "a lion and a bear", ("bear",), 1.0),
        ("open", "a bearing", ("bear",), 0.0),
        ("relaxed", "104", ("100",), 1.0),
        ("relaxed", "106", ("100",), 0.0),
        ("relaxed", "12%", ("0.12",), 1.0),
        ("relaxed", "Blue.", ("blue",), 1.0),
        ("vqa", "The two dogs", ("2 dogs",) * 10, 1.0),
        ("anls", "Stop", ("stop", "halt"), 1.0),
    ],
)  # fmt: skip
def test_rules(rule: RuleName, text: str, expected: tuple[str, ...], credit: float) -> None:
    found = RULES[rule]
    assert found.credit(found.read(text, ()), expected) == credit


def test_vqa_accuracy_leaves_one_person_out() -> None:
    people = ["cat"] * 3 + ["dog"] * 7
    # Without one of the three, two agree; without one of the others, three.
    assert vqa_accuracy("cat", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("bird", people) == 0


def test_anls_has_a_threshold() -> None:
    assert anls("stap", ["stop"]) == 0.75
    assert anls("xxop", ["stop"]) == 0.5
    assert anls("xxxp", ["stop"]) == 0


def test_numbers_are_rounded_to_the_digits_of_the_right_one() -> None:
    assert same_number("3.14159", ["3.14"]) == 1
    assert same_number("3.2", ["3.14"]) == 0
    assert same_number("none", ["3"]) == 0
    assert read_number("none at all") == "none at all"
    assert relaxed("0", ["0"]) == 1
