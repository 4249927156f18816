"""Runs of users: stored once, read by several processes at a time, kept through upgrades, refused in one line."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from catalog_fixtures import card, make_run, mine, small
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from taxonomy import files, paths, schema
from taxonomy.catalog import build
from taxonomy.errors import CatalogError
from taxonomy.runs import (
    Measurement,
    Run,
    ask,
    digest,
    insert_run,
    open_runs,
    record_run,
    results,
    upgrade,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "er" / "runs.sqlite"
    monkeypatch.setenv("ZOO_CATALOG", str(path))
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The user's catalogue in a file, and on a PostgreSQL server."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("place"))
    url = request.getfixturevalue("database")
    monkeypatch.setenv("ZOO_CATALOG", url)
    return str(url)


def test_reading_creates_nothing(place: Path) -> None:
    assert mine() == []
    assert not place.exists()


def test_a_run_comes_back_as_it_was(either: str) -> None:
    run = make_run(parameters={"größe": [1, None, "x:y %s 😀"]}, report={"unit": "parameters", "kept": 1.0})
    assert [record_run(run), record_run(run)] == [run.key] * 2  # the same key is stored once
    (found,) = results(reference=False)
    for name in (
        "key",
        "method",
        "model",
        "parameters",
        "config",
        "seed",
        "dtype",
        "device",
        "status",
        "started",
        "seconds",
    ):
        assert getattr(found, name) == getattr(run, name)
    assert set(found.measurements) == set(run.measurements)
    assert found.environment == run.environment
    assert (found.origin, found.hardware) == ("own", "2 x86-64 cores")


def test_plain_values_are_accepted_and_get_a_key(place: Path) -> None:
    row = make_run().to_json()
    del row["key"]
    assert record_run(row) != record_run(row)
    assert len(mine()) == 2


def test_same_key_is_stored_once(place: Path) -> None:
    run = make_run()
    with open_runs() as store:
        assert store.record(run) == store.record(run) == run.key
    assert mine() == [run.key]
    with sqlite3.connect(place) as db:
        assert db.execute("SELECT count(*) FROM measurement").fetchone() == (len(run.measurements),)


def test_models_and_environments_are_shared(place: Path) -> None:
    other = {"torch": "2.13.0", "hardware": "2 x86-64 cores"}  # another order is the same environment
    for run in (make_run(), make_run(environment=other), make_run(environment={**other, "torch": "2.12"})):
        record_run(run)
    with sqlite3.connect(place) as db:
        assert db.execute("SELECT count(*) FROM environment").fetchone() == (2,)
        assert db.execute("SELECT count(*) FROM model").fetchone() == (1,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_filters(either: str) -> None:
    old = make_run(key="old", started="2026-01-01T00:00:00Z")
    stack = make_run(key="stack", method="flap+prompt-lookup", started="2026-02-01T00:00:00Z")
    bare = make_run(key="bare", method="cfsp", model="other", measurements=(), status="failed", error="NaN")
    for run in (old, stack, bare):
        record_run(run)
    assert mine() == ["bare", "stack", "old"]
    assert mine(limit=1) == ["bare"]
    assert mine(method="flap") == ["stack", "old"]
    assert mine(method="prompt-lookup") == ["stack"]
    assert mine(method="flap+prompt-lookup") == ["stack"]
    assert mine(model="other") == mine(status="failed") == ["bare"]
    assert mine(quantity="prefill") == ["stack", "old"]
    assert mine(quantity="decode") == []


def test_own_runs_beside_reference_runs(as_catalog: Path) -> None:
    record_run(make_run(key="own-1", started="2027-01-01T00:00:00Z"))
    assert [(result.key, result.origin) for result in results("flap")] == [
        ("own-1", "own"),
        ("reference-1", "reference"),
    ]


def test_config_ignores_when_and_where() -> None:
    run = make_run()
    assert run.config == make_run(started="2027-01-01T00:00:00Z", environment={"hardware": "a GPU"}).config
    assert run.config != make_run(seed=1).config
    assert run.config != make_run(parameters={"sparsity": 0.5}).config
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "flap+"}, "'method'"),
        ({"status": "fine"}, "status 'fine'"),
        ({"started": "yesterday"}, "ISO 8601"),
        ({"started": "2026-05-04T10:11:12+02:00"}, "UTC"),
        ({"environment": {}}, "'hardware'"),
        ({"parameters": {"x": float("nan")}}, "JSON"),
        ({"parameters": {"x": object()}}, "JSON"),
        ({"measurements": (Measurement("q", "dense", "s", 1.0),) * 2}, "measured twice"),
        ({"measurements": (Measurement("q", "both", "s", 1.0),)}, "arm 'both'"),
        ({"measurements": (Measurement("q", "dense", "s", 1.0, n=0),)}, "n = 0"),
        ({"measurements": (Measurement("q", "dense", "s", float("inf")),)}, "JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused(place: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(CatalogError, match=said):
        record_run(make_run(**changes))
    assert mine() == []


def test_json_form_is_read_back_and_checked() -> None:
    run = make_run()
    assert Run.from_json(run.to_json()) == run
    with pytest.raises(CatalogError, match=r"here: .*'colour'"):
        Run.from_json({**run.to_json(), "colour": 1}, "here")
    with pytest.raises(CatalogError, match="'seconds'"):
        Run.from_json({name: value for name, value in run.to_json().items() if name != "seconds"})


def test_rebuilding_the_catalogue_touches_no_run(as_catalog: Path, tmp_path: Path) -> None:
    record_run(make_run(key="kept", method="a-method-without-a-card"))
    build(small(card()), tmp_path / "catalog.sqlite")
    build(small(card(year=2020)), tmp_path / "catalog.sqlite")
    assert mine(method="a-method-without-a-card") == ["kept"]


# --- files that are not as they should be ---------------------------------------------------------------------


def test_damaged_foreign_and_newer_files(place: Path) -> None:
    place.parent.mkdir(parents=True)
    place.write_bytes(b"no database " * 1000)
    for action in (lambda: record_run(make_run()), mine):
        with pytest.raises(CatalogError, match="damaged"):
            action()
    place.unlink()
    with sqlite3.connect(place) as db:
        db.execute("CREATE TABLE theirs (x)")
    for action in (lambda: record_run(make_run()), mine):
        with pytest.raises(CatalogError, match="not a catalogue of the zoo"):
            action()
    with sqlite3.connect(place) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    place.unlink()
    record_run(make_run())
    with sqlite3.connect(place) as db:
        db.execute("UPDATE alembic_version SET version_num = '0099'")
    for action in (lambda: record_run(make_run()), mine):
        with pytest.raises(CatalogError, match="newer zoo"):
            action()


def test_an_empty_file_becomes_a_catalogue(place: Path) -> None:
    place.parent.mkdir(parents=True)
    place.touch()
    record_run(make_run(key="first"))
    assert mine() == ["first"]


def test_places_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CatalogError, match=r"cannot be written.*ZOO_CATALOG"):
        record_run(make_run(), str(tmp_path / "file" / "runs.sqlite"))
    monkeypatch.setenv("ZOO_CATALOG", str(tmp_path))
    with pytest.raises(CatalogError, match="is a folder"):
        record_run(make_run())
    for url, said in (("nonsense://x", "nonsense"), ("mssql+nothing://u:secret@h/d", "ZOO_CATALOG")):
        monkeypatch.setenv("ZOO_CATALOG", url)
        with pytest.raises(CatalogError, match=said) as error:
            record_run(make_run())
        assert "secret" not in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions work otherwise there")
def test_a_read_only_folder_can_be_read_and_says_why_not_written() -> None:
    folder = Path(tempfile.mkdtemp())  # everybody may look into its parents, unlike those of tmp_path
    place = folder / "runs.sqlite"
    record_run(make_run(key="seen"), str(place))
    probe = (
        "import os, sys\n"
        "from taxonomy.runs import results, record_run\n"
        "from taxonomy.errors import CatalogError\n"
        "from catalog_fixtures import make_run\n"
        "results(reference=False)\n"  # imports what it needs while everything can be read
        "if os.getuid() == 0: os.seteuid(65534)\n"  # permissions do not bind root
        "print([r.key for r in results(reference=False)])\n"
        "try: record_run(make_run())\n"
        "except CatalogError as error: print(error)\n"
    )
    place.chmod(0o444)
    folder.chmod(0o555)
    try:
        found = subprocess.run(
            [sys.executable, "-c", probe],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ZOO_CATALOG": str(place)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
    assert found[0] == "['seen']"
    assert "cannot be written" in found[1]
    assert "ZOO_CATALOG" in found[1]


def test_a_busy_file_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run(make_run())
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.1)
    holder = sqlite3.connect(place, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(CatalogError, match="busy"):
            record_run(make_run())
        assert len(mine()) == 1  # readers do not wait for a writer
    finally:
        holder.close()


# --- several processes ----------------------------------------------------------------------------------------


def _write(where: str, worker: int, count: int) -> None:
    for number in range(count):
        record_run(make_run(key=f"{worker}-{number}"), where)


def _read(where: str, until: int, seen: multiprocessing.Queue) -> None:
    last, rounds = 0, 0
    deadline = time.monotonic() + 60
    while last < until and time.monotonic() < deadline:
        found = results(where=where, reference=False, limit=None)
        assert all(len(result.measurements) == 3 for result in found)  # never half a run
        assert len(found) >= last
        last, rounds = len(found), rounds + 1
    seen.put((last, rounds))


def test_writers_and_a_reader_at_once(either: str) -> None:
    """Four processes create the same catalogue and write to it while a fifth reads: nothing is lost or half there."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    seen = context.Queue()
    workers = [context.Process(target=_write, args=(either, worker, 8)) for worker in range(4)]
    reader = context.Process(target=_read, args=(either, 32, seen))
    for process in (*workers, reader):
        process.start()
    for process in (*workers, reader):
        process.join(90)
    assert [process.exitcode for process in (*workers, reader)] == [0] * 5
    assert seen.get(timeout=5)[0] == 32
    assert sorted(mine(limit=None)) == sorted(
        f"{worker}-{number}" for worker in range(4) for number in range(8)
    )


def _write_together(where: str, worker: int, order: list[int]) -> None:
    """Many runs in one transaction, of models and environments that other workers write too, in another order."""
    with open_runs(where) as store:
        for repeat in range(5):
            with store.writing() as connection:
                for number in order:
                    hardware = {"hardware": f"machine {number} of round {repeat}"}
                    key = f"{worker}-{repeat}-{number}"
                    insert_run(
                        connection, make_run(key=key, model=f"m{number}-{repeat}", environment=hardware)
                    )


def test_transactions_that_cross_each_other(either: str) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    orders = [list(range(6)), list(reversed(range(6)))]
    workers = [
        context.Process(target=_write_together, args=(either, worker, orders[worker])) for worker in range(2)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join(90)
    assert [process.exitcode for process in workers] == [0, 0]
    assert len(mine(limit=None)) == 2 * 5 * 6
    assert ask("SELECT count(*) FROM model")[1] == ask("SELECT count(*) FROM environment")[1] == [(30,)]


# --- migrations -----------------------------------------------------------------------------------------------


def _migrated() -> sa.Engine:
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    with engine.begin() as connection:
        upgrade(connection)
    return engine


def test_migrations_lead_to_the_schema() -> None:
    """From nothing, all revisions make what ``create_all`` makes at once."""
    migrated, created = _migrated(), sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    with created.begin() as connection:
        schema.create_all(connection)
    with migrated.connect() as old, created.connect() as new:
        options = {"include_name": lambda name, kind, _: kind != "table" or name in schema.metadata.tables}
        assert compare_metadata(MigrationContext.configure(old, opts=options), schema.metadata) == []
        query = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"

        def normal(connection: sa.Connection) -> dict[str, list[str]]:
            rows = connection.exec_driver_sql(query)
            return {name: sorted(re.findall(r"[^\s,()]+", sql or "")) for name, sql in rows}

        assert normal(old) == normal(new)
        versions = [c.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() for c in (old, new)]
    assert versions == [files.REVISION, files.REVISION]


def test_newest_revision_is_the_one_named() -> None:
    names = sorted(path.name for path in (paths.MIGRATIONS / "versions").glob("[0-9]*.py"))
    assert names[-1].startswith(files.REVISION)


@pytest.fixture
def next_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The zoo of the future: one more revision, which adds a column."""
    folder = tmp_path / "migrations"
    shutil.copytree(paths.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "0003_mood.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n\nrevision = '0003'\ndown_revision = '0002'\n\n\n"
        "def upgrade():\n    op.add_column('run', sa.Column('mood', sa.String()))\n"
    )

    def switch() -> None:
        monkeypatch.setattr(paths, "MIGRATIONS", folder)
        monkeypatch.setattr(files, "REVISION", "0003")

    return type("Future", (), {"begin": staticmethod(switch), "folder": folder})


def test_an_older_catalogue_is_upgraded_and_keeps_its_runs(either: str, next_revision: object) -> None:
    record_run(make_run(key="before"))
    next_revision.begin()
    assert mine() == ["before"]  # reading upgrades too
    record_run(make_run(key="after"))
    assert sorted(mine()) == ["after", "before"]
    assert ask("SELECT mood FROM run")[1] == [(None,), (None,)]
    assert ask("SELECT version_num FROM alembic_version")[1] == [("0003",)]
    assert ask("SELECT key FROM v_run ORDER BY key")[1] == [("after",), ("before",)]


def test_an_upgrade_that_fails_changes_nothing(
    either: str, next_revision: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_run(make_run(key="before"))
    folder = next_revision.folder
    with (folder / "versions" / "0003_mood.py").open("a") as file:
        file.write("    op.execute('SELECT nonsense FROM nowhere')\n")
    next_revision.begin()
    with pytest.raises(CatalogError, match="nowhere"):
        record_run(make_run())
    monkeypatch.setattr(files, "REVISION", "0002")
    assert "mood" not in ask("SELECT * FROM run")[0]
    assert ask("SELECT version_num FROM alembic_version")[1] == [("0002",)]
    assert ask("SELECT key FROM v_run")[1] == [("before",)]


def test_schema_is_valid_for_postgresql() -> None:
    """Without a server: the statements can be written down for it, and none speaks of SQLite."""
    dialect = postgresql.dialect()
    for table in schema.metadata.sorted_tables:
        statement = str(CreateTable(table).compile(dialect=dialect))
        assert statement.strip().startswith("CREATE TABLE")
        assert "ROWID" not in statement
