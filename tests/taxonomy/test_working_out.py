"""What the build works out is what the tables say that it was worked out from."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from catalog_fixtures import card, make_run, real_sources, small

from taxonomy import evidence, files, queries, schema
from taxonomy.catalog import Measurement as Figure
from taxonomy.catalog import Run, build, check, open_runs
from taxonomy.queries.conditions import below
from taxonomy.vocabulary import FACETS

FIGURES = (
    Figure("prefill-time", "dense", "s", 1.0, 0.01, 5, "128 tokens"),
    Figure("prefill-time", "method", "s", 0.5, 0.02, 5, "128 tokens"),
    Figure("prefill-time-bound", "ratio", "times", 1.9, None, 1, "128 tokens"),
    Figure("perplexity", "dense", "1", 10.0, None, 1, "news"),
    Figure("perplexity", "method", "1", 12.5, None, 1, "news"),
    Figure("perplexity", "dense", "1", 10.0, None, 1, "books"),
    Figure("perplexity", "method", "1", 20.0, None, 1, "books"),
    Figure("agreement", "method", "1", 0.9, None, 1, "news"),
    Figure("tokens-kept", "method", "1", 7.0),
)


def run(**changes: object) -> Run:
    return make_run(**{"key": "a" * 32, "model": "small", "measurements": FIGURES, **changes})


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make one reference run all that commands know, beside an empty place for the user's own."""
    monkeypatch.setenv("ZOO_CATALOG", str(tmp_path / "own.sqlite"))
    target = tmp_path / "catalog.sqlite"
    monkeypatch.setattr("taxonomy.paths.catalog_file", lambda: target)

    def make(*runs: Run) -> Path:
        build(small(runs=runs), target)
        return target

    return make


@pytest.fixture
def db(built: Path) -> Iterator[sqlite3.Connection]:
    with closing(files.connect(built, immutable=True)) as connection:
        yield connection


def test_users_of_a_term_include_those_below_it(db: sqlite3.Connection) -> None:
    cards = real_sources().cards.values()
    stored = {row[:2]: row[2:] for row in db.execute("SELECT facet, term, cards, methods FROM term_use")}
    assert len(stored) == sum(len(facet.terms) for facet in FACETS.values())
    for facet in FACETS.values():
        for term in facet.terms:
            among = set(below(facet, [term.id]))
            users = sorted(one.slug for one in cards if among & set(one.terms(facet.id)))
            assert stored[facet.id, term.id] == (len(users), " ".join(users))


def test_topics_count_papers_and_cards(db: sqlite3.Connection) -> None:
    slow = """SELECT (SELECT count(*) FROM paper_topic p WHERE p.topic = o.id),
        (SELECT count(DISTINCT l.method) FROM method_paper l WHERE l.paper IN
            (SELECT p.paper FROM paper_topic p WHERE p.topic = o.id))
        FROM topic o ORDER BY o.id"""
    assert [(row.papers, row.cards) for row in queries.topics(db)] == db.execute(slow).fetchall()


def test_reference_runs_and_own_runs_score_alike(
    reference: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference()
    with open_runs() as store:
        store.record(run())
    (own,) = evidence.trials(model="small")
    monkeypatch.setenv("ZOO_CATALOG", str(tmp_path / "empty.sqlite"))
    reference(run())
    (shipped,) = evidence.trials(model="small")
    assert (own.origin, shipped.origin) == ("own", "reference")
    assert replace(own, origin="reference") == shipped
    assert shipped.scores["perplexity"].parts == (0.5, 0.8)
    assert shipped.scores["prefill-time"].credited == 1.9
    assert set(shipped.scores) == {"prefill-time", "perplexity", "agreement"}


def test_a_newer_own_run_replaces_the_reference_run(reference: Callable[..., Path]) -> None:
    reference(run())
    faster = (*FIGURES[:1], replace(FIGURES[1], median=0.4), *FIGURES[2:])
    with open_runs() as store:
        store.record(run(key="b" * 32, started="2027-01-01T00:00:00Z", measurements=faster))
    (trial,) = evidence.trials(model="small")
    assert (trial.origin, trial.scores["prefill-time"].value) == ("own", 2.5)


def test_a_run_that_failed_is_no_trial(reference: Callable[..., Path]) -> None:
    catalog = reference(run(status="failed", error="out of memory"))
    assert evidence.trials(model="small") == []
    with closing(files.connect(catalog, immutable=True)) as connection:
        used = "SELECT u.runs FROM model_use u JOIN model o ON o.id = u.model WHERE o.ref = 'small'"
        assert connection.execute(used).fetchall() == [(0,)]


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE similar SET score = score / 2 WHERE method = 'alpha'",
        "DELETE FROM term_use WHERE term = 'prefill'",
        "UPDATE model_use SET runs = 5",
        "UPDATE score SET value = 9 WHERE quantity = 'agreement'",
    ],
)
def test_check_looks_at_what_was_worked_out(tmp_path: Path, edit: str) -> None:
    sources = small(card(), card(slug="beta", name="Beta"), runs=[run(method="alpha")])
    target = tmp_path / "catalog.sqlite"
    build(sources, target)
    assert check(sources, target) is None
    with closing(sqlite3.connect(target)) as connection:
        assert connection.execute(edit).rowcount > 0
        connection.commit()
    assert edit.split()[1 if edit.startswith("UPDATE") else 2] in str(check(sources, target))


def test_a_users_catalogue_holds_nothing_that_could_be_out_of_step(tmp_path: Path) -> None:
    own = tmp_path / "own.sqlite"
    with open_runs(str(own)) as store:
        store.record(run())
    with closing(sqlite3.connect(own)) as connection:
        tables = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
    assert not tables & set(schema.worked_out.tables)
