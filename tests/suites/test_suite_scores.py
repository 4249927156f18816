"""Scores of datasets, and a suite's own figures, against values made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zoo.suites.rows import Question
from zoo.suites.scores import DatasetResult, Speed, dataset_score, summarise
from zoo.suites.tables import Dataset


def questions(rows: list[dict[str, Any]], **fields: Any) -> list[Question]:
    made = Dataset.model_validate({"name": "made-up", "ability": "any", "hub": "owner/name", **fields})
    return [Question(made, row) for row in rows]


def test_mme_counts_single_answers_and_pairs_by_category() -> None:
    rows = [
        {"answer": "Yes", "category": c, "question_id": q} for c, q in ["a1", "a1", "a2", "a2", "b1", "b1"]
    ]
    asked = questions(rows, rule="yes-no", per="category", groups=[["question_id"]])
    # a: 3 of 4 single answers, 1 of 2 pairs; b: 1 of 2, and no pair.
    assert dataset_score(asked, [], [1, 1, 1, 0, 0, 1]) == pytest.approx(((0.75 + 0.5) / 2 + 0.25) / 2)


def test_a_circular_question_counts_when_every_order_is_right() -> None:
    rows = [{"answer": "A", "index": index} for index in (1, 2, 1_000_001, 1_000_002, 3)]
    asked = questions(rows, rule="letter", groups=[["index"]], modulo={"index": 1_000_000}, single=False)
    assert dataset_score(asked, [], [1, 1, 1, 0, 0]) == pytest.approx(1 / 3)


def test_hallusionbench_is_the_mean_of_three_accuracies() -> None:
    rows = [{"answer": "1", "figure": f, "asked": q} for f, q in ("11", "12", "21", "22")]
    asked = questions(rows, rule="yes-no", groups=[["figure"], ["asked"]])
    assert dataset_score(asked, [], [1, 1, 1, 0]) == pytest.approx((0.75 + 0.5 + 0.5) / 3)


def test_f1_is_that_of_yes() -> None:
    asked = questions([{"answer": one} for one in ("yes", "yes", "no", "no")], rule="yes-no", measure="f1")
    said = ["yes", "no", "yes", "what"]
    assert dataset_score(asked, said, []) == pytest.approx(0.5)  # precision and recall are both 1/2
    assert dataset_score(asked, ["no"] * 4, []) == 0


def result(name: str, ability: str, dense: float, method: float | None = None, **more: Any) -> DatasetResult:
    return DatasetResult(dataset=name, ability=ability, questions=10, dense=dense, method=method, **more)


def test_a_suites_own_figures() -> None:
    found = summarise(
        [
            result("a", "reading", 0.8, 0.4, loyalty=0.5),
            result("b", "reading", 0.5, 0.5, loyalty=0.9),
            result("c", "counting", 0.4, 0.36, loyalty=1.0),
            result("d", "counting", 0.0, 0.1, loyalty=1.0),
        ]
    )
    assert found.dense == pytest.approx(0.425)
    assert found.method == pytest.approx(0.34)
    assert found.abilities["reading"].method == pytest.approx(0.45)
    assert found.retained == pytest.approx((0.5 + 1 + 0.9) / 3)
    assert found.retained_rms == pytest.approx(math.sqrt((0.25 + 1 + 0.81) / 3))
    assert (found.lowest, found.lowest_ratio) == ("a", 0.5)
    assert found.retained_without_lowest == pytest.approx(0.95)
    assert found.without_ratio == ["d"]
    assert found.loyalty == pytest.approx(0.85)
    assert found.unevenness == pytest.approx(100 * 0.216025 / 0.8, rel=1e-5)
    assert (found.prefill_gain, found.decode_gain) == (None, None)


def test_times_are_averaged_not_gains() -> None:
    found = summarise(
        [
            result("a", "x", 1, 1, dense_speed=Speed(prefill=90, decode=10), method_speed=Speed(prefill=30, decode=20)),
            result("b", "x", 1, 1, dense_speed=Speed(prefill=10, decode=10), method_speed=Speed(prefill=10, decode=10)),
        ]
    )  # fmt: skip
    assert found.prefill_gain == pytest.approx(100 / 40)
    assert found.decode_gain == pytest.approx(2 / (1 + 0.5))


def test_without_a_method_there_is_only_a_score() -> None:
    found = summarise([result("a", "x", 0.5)])
    assert (found.dense, found.method, found.retained, found.unevenness) == (0.5, None, None, None)


def test_a_model_that_scores_nothing_retains_nothing() -> None:
    found = summarise([result("a", "x", 0.0, 0.2, loyalty=0.1)])
    assert (found.retained, found.without_ratio) == (None, ["a"])
