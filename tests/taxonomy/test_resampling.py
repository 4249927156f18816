"""Bootstrap over questions: paired, reproducible, and as wide as the binomial distribution says."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest

from taxonomy.evidence import Score, Trial
from taxonomy.finding import Finding, judge
from taxonomy.resampling import samples

QUESTIONS = 200


def trial(
    method: str, right: str, dense: str, budget: float = 0.5
) -> tuple[Trial, dict[str, tuple[str, str]]]:
    kept = right.count("1") / dense.count("1")
    score = Score("accuracy", ("count",), (kept,), kept, 0.0, None, None, None, "1")
    made = Trial(
        f"{method}-{budget}", "own", method, "vlm", "cores", "e", "cpu", "float32", "1", "2026-05-04T10:11:12Z", "c",
        {"keep_ratio": budget}, {"accuracy": score},
    )  # fmt: skip
    return made, {"count": (dense, right)}


def pattern(share: float) -> str:
    right = round(share * QUESTIONS)
    return "1" * right + "0" * (QUESTIONS - right)


def beats(better: str, than: str) -> Finding:
    test = {"kind": "beats", "better": [better], "than": [than]}
    return Finding.model_validate(
        {"slug": "x", "title": "t", "claim": "c", "source": "s", "card": "flap", "test": test}
    )


def test_the_spread_is_the_binomial_one() -> None:
    """With a model that is always right, what is kept is a plain share of n questions."""
    one, answers = trial("one", pattern(0.7), "1" * QUESTIONS)
    drawn = samples([one], {one.key: answers}, "accuracy", 2000)
    assert drawn is not None
    kept = [sample[0].scores["accuracy"].value for sample in drawn]
    assert fmean(kept) == pytest.approx(0.7, abs=0.005)
    assert stdev(kept) == pytest.approx((0.7 * 0.3 / QUESTIONS) ** 0.5, rel=0.1)


def test_methods_that_answer_alike_stay_alike_in_every_sample() -> None:
    pairs = [trial(name, pattern(0.6), pattern(0.8)) for name in ("one", "two")]
    drawn = samples([t for t, _ in pairs], {t.key: a for t, a in pairs}, "accuracy", 50, seed=3)
    assert drawn is not None
    values = [tuple(t.scores["accuracy"].value for t in sample) for sample in drawn]
    assert all(one == two for one, two in values)
    assert len({one for one, _ in values}) > 10


def test_a_pairing_decides_what_two_intervals_alone_would_not() -> None:
    """One method is right on a few questions more and nowhere less: paired, that is certain."""
    dense = pattern(0.9)
    better, first = trial("better", pattern(0.60), dense)
    worse, second = trial("worse", pattern(0.55), dense)
    outcomes = {better.key: first, worse.key: second}
    outcome = judge(beats("better", "worse"), [better, worse], outcomes)
    assert (outcome.verdict, outcome.over, outcome.cells) == ("agrees", "questions", 1)
    assert outcome.low is not None
    assert outcome.low > 1
    # The same shares on questions that have nothing to do with each other: nobody knows.
    apart = pattern(0.55)[::-1]
    other, third = trial("worse", apart, dense[::-1])
    third = {"count": (dense, third["count"][1])}
    undecided = judge(beats("better", "worse"), [better, other], {better.key: first, other.key: third})
    assert undecided.verdict == "undecided"


def test_without_the_answers_of_every_run_cells_are_drawn() -> None:
    better, first = trial("better", pattern(0.6), pattern(0.9))
    worse, _ = trial("worse", pattern(0.5), pattern(0.9))
    assert samples([better, worse], {better.key: first}, "accuracy", 5) is None
    assert judge(beats("better", "worse"), [better, worse], {better.key: first}).verdict == "not measured yet"
