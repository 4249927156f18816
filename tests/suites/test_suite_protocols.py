"""The suites that come with the zoo, on made-up tables of the form that their datasets have on the hub."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from zoo.suites.answers import RULES, said_yes
from zoo.suites.rows import read_questions
from zoo.suites.scores import dataset_score
from zoo.suites.tables import load_suite, suite_names

LETTERS = {"question": "Which?", "A": "x", "B": "y", "C": "nan", "D": None, "hint": "nan", "answer": "B"}
HALLUSION = {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "1"}
MMMU: dict[str, Any] = {f"image_{number}": None for number in range(2, 8)}

ROWS: dict[str, list[dict[str, Any]]] = {
    "mme": [
        {"question": f"Is it {what}? Please answer yes or no.", "answer": answer, "category": "color",
         "question_id": "color/1.png"} for what, answer in (("red", "Yes"), ("blue", "No"))
    ],
    "mmbench-en": [{**LETTERS, "index": "7"}, {**LETTERS, "index": "1000007", "answer": "A"}],
    "mmbench-cn": [{**LETTERS, "index": 7, "hint": "看图"}],
    "seed-bench-2-plus": [
        {"question": "Which?", **{f"choice_{letter}": letter.lower() for letter in "ABCD"}, "answer": "D"}
    ],
    "ocrbench": [
        {"question": "Read it.", "answer": ["Stop"], "dataset": "IIIT5K"},
        {"question": "Write the formula.", "answer": [r"\frac { a } { b }"], "dataset": "HME100k"},
    ],
    "scienceqa": [{"question": "Which?", "hint": "", "choices": ["x", "y"], "answer": 1}],
    "pope": [{"question": "Is there a dog?", "answer": answer} for answer in ("yes", "no")],
    "hallusionbench": [
        {**HALLUSION, "question": "Is it?", "question_id": str(number), "gt_answer": str(number)}
        for number in range(2)
    ],
    "math-vision": [
        {"question": "How many?", "options": [], "answer": "7"},
        {"question": "Which?", "options": ["1", "2", "3"], "answer": "C"},
    ],
    "mathvista": [
        {"query": "Hint: a number.", "choices": None, "answer": "1.2"},
        {"query": "Hint: a letter.", "choices": ["10", "20"], "answer": "20"},
    ],
    "docvqa": [{"question": "Who?", "answers": ["A. Smith", "Smith"]}],
    "chartqa": [{"question": "How much?", "answer": "42.5"}],
    "textvqa": [{"question": "what does it say?", "answers": ["stop"] * 10}],
    "ai2d": [{"question": "Which?", "options": ["1", "0"], "answer": "1"}],
    "gqa": [{"question": "What is it?", "answer": "dog", "imageId": "n1"}],
    "mmmu": [
        {"question": "<image 1> Which?", "options": "['x', 'y']", "answer": "B", **MMMU},
        {"question": "<image 1> How many?", "options": "[]", "answer": "['3', 'three']", **MMMU},
    ],
    "realworldqa": [
        {"question": "Which?\nA. x\nB. y", "answer": "B"}, {"question": "How many?", "answer": "Two"},
    ],
    "mmstar": [{"question": "Which? Options: A: x, B: y", "answer": "B", "l2_category": "localization"}],
}  # fmt: skip


class Table(list[dict[str, Any]]):
    """Rows as the datasets library gives them."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def cast_column(self, column: str, kind: Any) -> Table:
        return self


@pytest.mark.parametrize("name", suite_names())
def test_who_knows_everything_gets_all_points(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stored, format="PNG")
    picture = {"bytes": stored.getvalue(), "path": None}
    suite = load_suite(name)
    for dataset in suite.datasets:
        if dataset.judge is not None:
            continue
        shown = {} if dataset.pictures else {dataset.images[0]: picture}
        rows = Table({**shown, **row} for row in ROWS[dataset.name])

        def load_dataset(
            hub: str, config: str | None, *, split: str, streaming: bool, rows: Table = rows
        ) -> Table:
            return Table([{"id": "n1", "image": picture}]) if config == "testdev_balanced_images" else rows

        library = SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: None)
        monkeypatch.setitem(sys.modules, "datasets", library)
        questions = list(read_questions(dataset))
        right = [
            said_yes(question.expected[0]) if question.rule == "yes-no" else question.expected[0]
            for question in questions
        ]
        said = [RULES[one.rule].read(text, one.choices) for one, text in zip(questions, right, strict=True)]
        credit = [
            RULES[one.rule].credit(text, one.expected) for one, text in zip(questions, said, strict=True)
        ]
        assert dataset_score(questions, said, credit) == 1, dataset.name
        assert all(len(question.pictures()) == 1 for question in questions)
        for question in questions:
            assert "nan" not in question.text
            assert "None" not in question.text
            assert "{" not in question.text.replace("\\boxed{}", "")
        wrong = [RULES[one.rule].read("no idea at all", one.choices) for one in questions]
        lost = [
            RULES[one.rule].credit(text, one.expected) for one, text in zip(questions, wrong, strict=True)
        ]
        assert dataset_score(questions, wrong, lost) < 1, dataset.name
