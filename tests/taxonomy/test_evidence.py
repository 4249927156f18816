"""Fronts and recommendations on runs whose right answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from sqlite3 import Connection

import pytest
from catalog_fixtures import make_run

from taxonomy import evidence, queries
from taxonomy.catalog import Measurement as Figure
from taxonomy.catalog import Run, open_runs
from taxonomy.errors import QueryError

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
    return make_run(method=method, parameters={"sparsity": sparsity}, **values)


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
