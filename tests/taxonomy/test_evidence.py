"""Fronts and recommendations on runs whose right answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from sqlite3 import Connection

import pytest
from catalog_fixtures import make_run, proof_of, timed_on

from taxonomy import evidence, queries
from taxonomy.catalog import Measurement as Figure
from taxonomy.catalog import Run, open_runs
from taxonomy.errors import QueryError
from taxonomy.runs import TRIAL

BUSY = {"hardware": "8 other cores"}


def weights_run(
    method: str, sparsity: float, gain: float, perplexity: float, bound: float = 3.0, **changes: object
) -> Run:
    """A pruning run: prefill of 1 s and perplexity 10 without the method."""
    figures = (
        Figure("prefill-time", "dense", "s", 1.0, 0.01, 5, "128 tokens"),
        Figure("prefill-time", "method", "s", 1 / gain, 0.01 / gain, 5, "128 tokens"),
        Figure("prefill-time", "ratio", "times", gain, None, 1, "128 tokens"),
        Figure("prefill-time-bound", "ratio", "times", bound, None, 1, "128 tokens"),
        Figure("perplexity", "dense", "1", 10.0, None, 1, "news"),
        Figure("perplexity", "method", "1", perplexity, None, 1, "news"),
    )
    values = {"model": "small", "model_facts": {"architecture": "llama"}, "measurements": figures, **changes}
    return make_run(**{"method": method, "parameters": {"sparsity": sparsity}, **values})


@pytest.fixture
def db(as_catalog: Path) -> Iterator[Connection]:
    with closing(queries.open_catalog(as_catalog)) as connection:
        yield connection


def keep(*runs: Run) -> None:
    with open_runs() as store:
        for run in runs:
            store.record(run)


def test_only_what_nothing_else_beats_is_best(db: Connection) -> None:
    keep(
        weights_run("flap", 0.2, 1.2, 11.0),
        weights_run("cfsp", 0.2, 1.3, 10.5),  # beats flap in both
        weights_run("wanda-sp", 0.5, 2.0, 20.0),  # faster than all
        weights_run("magnitude-sp", 0.5, 1.9, 90.0),
        weights_run("wanda", 0.5, 1.01, 10.1),  # within the noise of no gain at all
    )
    (front,) = evidence.pareto(db, family="weight-pruning", model="small")
    assert [(point.trial.method, point.best) for point in front.points] == [
        ("wanda", False),
        ("flap", False),
        ("cfsp", True),
        ("magnitude-sp", False),
        ("wanda-sp", True),
    ]
    cfsp = front.points[2]
    assert cfsp.quality.value == pytest.approx(10 / 10.5)
    assert (front.gain, front.quality, front.quality_tasks) == ("prefill-time", "perplexity", ("news",))


def test_a_gain_above_its_bound_counts_as_the_bound(db: Connection) -> None:
    keep(weights_run("sparsegpt", 0.5, 1.5, 10.2, bound=1.0), weights_run("flap", 0.2, 1.2, 11.0))
    (front,) = evidence.pareto(db, model="small")
    assert {p.trial.method: (p.best, p.gain.suspect) for p in front.points} == {
        "sparsegpt": (False, True),
        "flap": (True, False),
    }
    answer = evidence.recommend(db, "small", "prefill", 0.5)
    assert [pick.method for pick in answer.picks] == ["flap"]


def test_only_like_runs_share_a_front_and_the_newest_counts(db: Connection) -> None:
    keep(
        weights_run("flap", 0.2, 1.2, 11.0),
        weights_run("flap", 0.2, 1.4, 11.0, started="2026-06-01T00:00:00Z"),
        weights_run("cfsp", 0.2, 1.3, 10.5, environment=BUSY),
        weights_run("cfsp", 0.2, 1.3, 10.5, dtype="bfloat16"),
    )
    fronts = evidence.pareto(db, model="small")
    assert len(fronts) == 3
    assert [p.gain.value for f in fronts for p in f.points if p.trial.method == "flap"] == [1.4]
    (other,) = evidence.pareto(db, model="small", hardware="8 OTHER")
    assert other.hardware == "8 other cores"
    assert evidence.pareto(db, model="small", hardware="%") == []


def test_without_a_model_the_one_measured_most_is_drawn(db: Connection) -> None:
    keep(
        weights_run("flap", 0.2, 1.2, 11.0, model="rare"),
        weights_run("flap", 0.2, 1.2, 11.0),
        weights_run("cfsp", 0.2, 1.2, 11.0),
    )
    assert {front.model for front in evidence.pareto(db, family="weight-pruning")} == {"small"}
    assert evidence.pareto(db, family="kv-cache") == []


def test_several_tasks_are_averaged(db: Connection) -> None:
    figures = tuple(
        Figure("accuracy", arm, "1", value, None, 100, task)
        for task, dense, method in (("count", 0.8, 0.4), ("read", 0.5, 0.5))
        for arm, value in (("dense", dense), ("method", method))
    )
    speed = (Figure("prefill-time", "ratio", "times", 2.0),)
    keep(make_run(method="divprune", model="vlm", measurements=figures + speed))
    (trial,) = evidence.trials(model="vlm")
    assert trial.scores["accuracy"].value == pytest.approx((0.5 + 1.0) / 2)
    assert trial.scores["accuracy"].tasks == ("count", "read")


def test_runs_on_one_task_each_are_one_trial(db: Connection) -> None:
    keep(
        timed_on("qa", 0.5, method="goose", noise=0.01),
        timed_on("chat", 2.0, method="goose", noise=0.08),
        timed_on("chat", 9.0, method="goose", key="older", started="2026-01-01T00:00:00Z", seed=1),
        timed_on("chat", 1.1, method="goose", key="elsewhere", environment=BUSY),
        timed_on("chat", 1.2, method="goose", key="another setting", parameters={"top_k": 3}),
    )
    found = evidence.trials(model="small")
    (whole,) = (trial for trial in found if trial.members)
    assert len(found) == 3
    speed = whole.scores["decode-speed"]
    assert (speed.tasks, speed.parts, speed.noise) == (("chat", "qa"), (2.0, 0.5), 0.08)
    assert speed.value == pytest.approx(2 / (1 / 2.0 + 1 / 0.5)), (
        "half the time of one task, twice that of the other"
    )
    assert speed.bound == pytest.approx(2 / (1 / 2.1 + 1 / 0.6))
    assert [run.key for run in whole.runs] == ["goose-chat", "goose-qa"]
    assert [trial.runs for trial in found if not trial.members] == [(t,) for t in found if not t.members]


def test_runs_whose_quality_is_of_another_task_stay_apart(db: Connection) -> None:
    keep(
        weights_run("flap", 0.2, 1.2, 11.0),
        weights_run("flap", 0.2, 1.4, 11.0, dtype="bfloat16"),
        timed_on("chat", 2.0, method="goose"),
    )
    assert [trial.members for trial in evidence.trials(model="small")] == [(), (), ()]


def test_the_gain_is_told_task_by_task(db: Connection) -> None:
    keep(
        *(timed_on(task, gain, method="goose") for task, gain in (("chat", 1.04), ("qa", 0.8), ("rag", 1.5)))
    )
    (front,) = evidence.pareto(db, family="decoding")
    assert front.by_task
    assert front.unchanged
    assert front.noise == front.noise_on("qa") == 0.05
    (point,) = front.points
    assert [(cell.task, cell.gain, cell.sure) for cell in point.cells] == [
        ("chat", 1.04, 1.0),  # within the noise
        ("qa", 0.8, 0.8),
        ("rag", 1.5, 1.5),
    ]
    assert [cell.passes for cell in point.cells] == pytest.approx([1.08, 0.6, 2.0])
    assert [cell.bound for cell in point.cells] == pytest.approx([1.14, 0.9, 1.6])


def test_a_proof_stands_beside_the_gain(db: Connection) -> None:
    keep(
        *(
            timed_on(task, 1.5, method=method)
            for task in ("chat", "qa")
            for method in ("goose", "rest", "medusa")
        ),
        proof_of("goose", 50, 50, parameters={"top_k": 3}),
        proof_of("rest", 49, 50),
        proof_of("medusa", 50, 50, device="cuda"),
    )
    (front,) = evidence.pareto(db, family="decoding")
    points = {point.trial.method: point for point in front.points}
    assert (points["goose"].proven.method, points["goose"].proven.dense) == (50, 50)
    assert points["rest"].proven.value == pytest.approx(0.98)
    assert points["medusa"].proven is None, "proven on another device only"
    assert {method: point.unchanged for method, point in points.items()} == {
        "goose": True, "rest": False, "medusa": True,
    }  # fmt: skip
    assert not front.unchanged
    asked = {loss: evidence.recommend(db, "small", "decode", loss).picks for loss in (0.0, 0.02)}
    assert [pick.method for pick in asked[0.0]] == ["goose", "medusa"]
    assert [pick.method for pick in asked[0.02]] == ["goose", "medusa", "rest"]
    assert "50 of 50 outputs compared one by one are the same" in asked[0.0][0].why


def test_a_count_without_its_total_says_nothing(db: Connection) -> None:
    keep(make_run(method="goose", model="small", measurements=proof_of("goose", 50, 50).measurements[1:]))
    (trial,) = evidence.trials(model="small")
    assert set(trial.scores) == {"tokens-per-step"}


def test_several_tasks_say_more_than_one_friendly_prompt(db: Connection) -> None:
    keep(
        timed_on("my poem", 3.0, method="goose", parameters={"top_k": 3}, key="friendly"),
        *(timed_on(task, gain, method="goose") for task, gain in (("chat", 1.0), ("qa", 1.1), ("rag", 1.6))),
        *(timed_on(task, 1.02, method="rest") for task in ("chat", "qa", "rag")),  # within the noise
        timed_on("my poem", 2.0, method="rest", parameters={"min_match": 3}, key="friendly too"),
    )
    (pick,) = evidence.recommend(db, "small", "decode", 0.0).picks
    assert (pick.method, pick.gain.value) == ("goose", pytest.approx(3 / (1 + 1 / 1.1 + 1 / 1.6)))
    assert "over 3 tasks, from 1.00× (chat) to 1.60× (rag)" in pick.why


def test_recommendation_is_measured_then_like_then_card(db: Connection) -> None:
    keep(
        weights_run("flap", 0.2, 1.2, 10.1),
        weights_run("flap", 0.3, 1.6, 10.15),
        weights_run("cfsp", 0.5, 1.9, 15.0),  # loses too much
    )
    here = evidence.recommend(db, "small", "prefill", 0.02)
    (pick,) = here.picks
    assert (pick.method, pick.basis) == ("flap", "measured")
    assert pick.command == "zoo run flap --model small --set sparsity=0.3"
    assert "1.60× prefill-time" in pick.why
    assert [p.method for p in evidence.recommend(db, "small", "prefill", 0.5).picks] == ["cfsp", "flap"]

    like = evidence.recommend(db, "meta-llama/Llama-2-7b", "prefill", 0.02)
    assert {pick.basis for pick in like.picks} == {"like"}
    assert "Nothing was measured on meta-llama/Llama-2-7b" in like.reason
    assert "same architecture (llama)" in like.reason
    assert like.picks[0].command.startswith("zoo run flap --model meta-llama/Llama-2-7b")

    card = evidence.recommend(db, "small", "decode", 0.0)
    assert {pick.basis for pick in card.picks} == {"card"}
    lossless = {row.slug for row in queries.find(db, properties={"lossless": True}, implemented=True)}
    assert card.picks
    assert {pick.method for pick in card.picks} <= lossless


@pytest.mark.parametrize(("text", "share"), [("2%", 0.02), ("0.02", 0.02), (" 12.5 %", 0.125), ("0", 0.0)])
def test_shares(text: str, share: float) -> None:
    assert evidence.parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "x", "-1%", "100%", "nan", "2%%", "2% of it"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(QueryError, match=r"write 2% or 0\.02"):
        evidence.parse_share(text)


def test_unknown_words_are_refused(db: Connection) -> None:
    for asked in ({"goal": "beauty"}, {"quality": "beauty"}, {"family": "beauty"}):
        with pytest.raises(QueryError, match="beauty"):
            evidence.pareto(db, **asked)


def test_cells_of_a_plan_that_differ_in_their_task_are_one_trial(as_catalog: Path) -> None:
    """Speed in one cell, two abilities in two others: together they are one point."""
    tasks = {
        "": ("prefill-time", "ms", 20.0, 10.0),
        "read": ("accuracy", "1", 0.8, 0.4),
        "count": ("accuracy", "1", 0.5, 0.5),
    }
    for method, digest in (("fastv", "one"), ("divprune", "other")):
        for task, (quantity, unit, dense, own) in tasks.items():
            arms = (("dense", dense), ("method", own))
            figures = tuple(Figure(quantity, arm, unit, value, task=task) for arm, value in arms)
            keep(make_run(method=method, inputs={"task": task, TRIAL: digest}, measurements=figures))
    found = {trial.method: trial for trial in evidence.trials(model="tiny-llama")}
    scores = found["fastv"].scores
    assert scores["accuracy"].tasks == ("count", "read")
    assert scores["accuracy"].value == pytest.approx(0.75)
    assert (scores["accuracy"].dense, scores["accuracy"].method) == (pytest.approx(0.65), pytest.approx(0.45))
    assert scores["prefill-time"].value == pytest.approx(2.0)
    assert [len(found[name].runs) for name in ("fastv", "divprune")] == [3, 3]


def test_draws_of_a_random_choice_count_as_their_mean(as_catalog: Path) -> None:
    """The luckiest of three draws would beat a method that is better than their mean."""
    lucky = (1.2, 1.4, 1.6)
    for seed, gain in enumerate(lucky):
        keep(weights_run("flap", 0.2, gain, 10 / 0.8, seed=0, parameters={"sparsity": 0.2, "seed": seed}))
    keep(weights_run("cfsp", 0.2, 1.5, 10 / 0.85))
    found = evidence.trials(model="small")
    assert len(found) == 4
    (front,) = evidence.fronts(found)
    points = {point.trial.method: point for point in front.points}
    assert len(front.points) == 2
    assert points["flap"].gain.value == pytest.approx(1.4)
    assert points["flap"].gain.noise == pytest.approx(0.2 / 1.4)
    assert points["flap"].trial.setting_text == "sparsity=0.2, mean of 3 seeds"
    assert (points["cfsp"].best, points["flap"].best) == (True, False)
    # The same seed twice: something else differs, so nothing is averaged.
    again = {"inputs": {"calibration": "other"}, "parameters": {"sparsity": 0.2, "seed": 1}}
    keep(weights_run("flap", 0.2, 1.3, 10 / 0.8, **again))
    (front,) = evidence.fronts(evidence.trials(model="small"))
    assert len(front.points) == 5
