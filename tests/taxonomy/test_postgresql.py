"""The catalogue of a team: a PostgreSQL server, and what only it can get wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from catalog_fixtures import card, make_run, mine, real_sources, small

from taxonomy import files, schema
from taxonomy.catalog import publish
from taxonomy.earlier import earlier_runs
from taxonomy.errors import CatalogError
from taxonomy.evidence import trials
from taxonomy.exchange import document, import_runs, stored_runs
from taxonomy.runs import Measurement, ask, open_runs, record_run, results, upgrade


@pytest.fixture
def team(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ZOO_CATALOG", database)
    return database


def tables(url: str) -> list[str]:
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    return sa.inspect(engine).get_table_names()


def test_reading_creates_nothing(team: str) -> None:
    assert mine() == []
    assert tables(team) == []


def test_runs_are_passed_on_and_drawn_from_a_server(as_catalog: Path, team: str, tmp_path: Path) -> None:
    """What reads the catalogue elsewhere: import and export, plans that go on, comparisons."""
    model = "measured-nowhere-else"
    assert stored_runs(reference=False) == earlier_runs([model]) == trials(model=model) == []
    figures = tuple(Measurement("prefill-time", arm, "ms", 2.0) for arm in ("dense", "method"))
    asked = {"cell": "c1", "task": {"name": "t"}}
    run = make_run(key="abroad", model=model, inputs=asked, measurements=figures)
    export = tmp_path / "runs.json"
    export.write_text(document([run]), encoding="utf-8")
    for expected in (1, 0):
        assert import_runs(export).added == expected
    (found,) = stored_runs(reference=False)
    assert (found.key, set(found.measurements)) == ("abroad", set(run.measurements))
    (earlier,) = earlier_runs([model])
    assert (earlier.key, earlier.cell, earlier.task, earlier.own) == ("abroad", "c1", "t", False)
    assert [result.origin for result in results(reference=False)] == ["imported"]
    assert [trial.key for trial in trials(model=model, methods=["flap"], hardware="x86")] == ["abroad"]


def test_reading_sees_one_state_and_cannot_write(team: str) -> None:
    record_run(make_run(key="first"))
    names, rows = ask("SELECT key, started::date AS day FROM v_run WHERE method LIKE 'fla%'")
    assert (names, [row[0] for row in rows]) == (["key", "day"], ["first"])
    for statement, said in (
        ("DELETE FROM run RETURNING key", "read-only"),
        ("COMMIT; DROP VIEW v_run", "read-only"),
        ("SELECT nonsense", "nonsense"),
        ("SET search_path TO public", "ask a SELECT"),
    ):
        with pytest.raises(CatalogError, match=said):
            ask(statement)
    assert mine() == ["first"]


def test_migrations_lead_to_the_schema(database: str) -> None:
    engine = sa.create_engine(database, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        upgrade(connection)
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert set(schema.VIEWS) <= set(sa.inspect(connection).get_view_names())


def test_foreign_and_newer_databases_are_refused(team: str) -> None:
    engine = sa.create_engine(team, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('8f3c')")
    for action in (lambda: record_run(make_run()), mine):
        with pytest.raises(CatalogError, match="tables of another program"):
            action()
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    record_run(make_run())
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0099'")
    for action in (lambda: record_run(make_run()), mine):
        with pytest.raises(CatalogError, match="newer zoo"):
            action()


def test_servers_that_do_not_answer_and_missing_drivers(monkeypatch: pytest.MonkeyPatch, team: str) -> None:
    for action in (record_run, lambda run, where: results(where=where)):
        with pytest.raises(CatalogError) as caught:
            action(make_run(), "postgresql+psycopg://zoo:secret@127.0.0.1:1/zoo")
        assert "refused" in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(CatalogError, match=r"pip install 'efficiency-zoo\[postgres\]'"):
        record_run(make_run())


def test_published_methods_stand_beside_the_runs(team: str) -> None:
    record_run(make_run(key="mine"))
    assert publish(real_sources())
    assert not publish(real_sources())  # nothing new
    joined = "SELECT r.key, m.name, m.family FROM v_run r JOIN v_method m ON m.slug = r.method"
    assert ask(joined)[1] == [("mine", "FLAP", "weight-pruning")]
    assert ask("SELECT count(*) FROM paper")[1] == [(len(real_sources().papers),)]
    assert ask("SELECT count(*) FROM v_claim")[1][0][0] > 100
    assert mine() == ["mine"]  # reference runs do not get among the team's
    assert publish(small(card()))
    assert ask("SELECT slug, family FROM v_method")[1] == [("alpha", "visual-token-pruning")]
    assert mine() == ["mine"]


def test_a_publication_that_fails_leaves_the_earlier_one(team: str) -> None:
    publish(small(card()))
    broken = small(
        card(), verification=[{"method": "nobody", "kind": "golden", "subject": "x", "passed": True}]
    )
    with pytest.raises(CatalogError, match="there is no card 'nobody'"):
        publish(broken)
    assert ask("SELECT slug FROM method")[1] == [("alpha",)]


def test_a_file_takes_them_too_and_can_be_searched(tmp_path: Path) -> None:
    place = str(tmp_path / "runs.sqlite")
    record_run(make_run(key="mine"), place)
    assert publish(real_sources(), place)
    assert publish(small(card()), place)
    found = ask(
        "SELECT m.slug FROM method_fts f JOIN method m ON m.id = f.rowid WHERE method_fts MATCH 'nobody'",
        place,
    )
    assert found[1] == [("alpha",)]
    assert [result.key for result in results(where=place, reference=False)] == ["mine"]
    with open_runs(place) as store, store.writing() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall() == []
    assert ask("SELECT version_num FROM alembic_version", place)[1] == [(files.REVISION,)]
