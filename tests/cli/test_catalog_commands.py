"""``zoo catalog`` and ``zoo results``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from catalog_fixtures import card, make_run, real_sources, small
from test_reading_commands import Zoo, zoo

from taxonomy import queries
from taxonomy.catalog import build
from taxonomy.runs import record_run

__all__ = ["zoo"]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without importing implementations: their parameters are tested elsewhere."""
    monkeypatch.setattr("zoo.cli.catalog_commands.sources", real_sources)


def test_build_then_check(zoo: Zoo, sources: None, tmp_path: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    code, out, _ = zoo("catalog", "build", "--file", str(target))
    assert code == 0
    assert ": written; " in out
    assert "3718 papers" in out
    assert ": unchanged; " in zoo("catalog", "build", "--file", str(target))[1]
    assert zoo("catalog", "check", "--file", str(target))[0] == 0


def test_check_fails_with_one_line(zoo: Zoo, sources: None, tmp_path: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    build(small(card()), target)
    code, out, err = zoo("catalog", "check", "--file", str(target))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "out of date" in err
    code, _, err = zoo("catalog", "check", "--file", str(tmp_path / "none"))
    assert code == 2
    assert "zoo catalog build" in err


def test_path(zoo: Zoo, as_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo("catalog", "path")[1].strip() == str(as_catalog)
    assert zoo("catalog", "path", "--runs")[1].strip().endswith("runs.sqlite")
    monkeypatch.setenv("ZOO_CATALOG", "postgresql+psycopg://me:secret@host/zoo")
    assert "secret" not in zoo("catalog", "path", "--runs")[1]


def test_publish_and_ask_beside_own_runs(zoo: Zoo, sources: None) -> None:
    record_run(make_run(key="mine"))
    code, out, _ = zoo("catalog", "publish")
    assert code == 0
    assert ": written; " in out
    assert "3718 papers" in out
    assert ": unchanged; " in zoo("catalog", "publish")[1]
    query = "SELECT r.key, m.name FROM v_run r JOIN v_method m ON m.slug = r.method"
    assert json.loads(zoo("catalog", "sql", query, "--runs", "--json")[1]) == [
        {"key": "mine", "name": "FLAP"}
    ]
    assert "FLAP" in zoo("catalog", "sql", query, "--runs")[1]
    code, out, err = zoo("catalog", "sql", "DELETE FROM run", "--runs")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert len(json.loads(zoo("results", "--own", "--json")[1])) == 1


def test_postgresql_through_the_commands(
    zoo: Zoo, sources: None, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CATALOG", database)
    assert json.loads(zoo("results", "--own", "--json")[1]) == []
    record_run(make_run(key="mine"))
    assert ": written; " in zoo("catalog", "publish")[1]
    assert [row["key"] for row in json.loads(zoo("results", "--own", "--json")[1])] == ["mine"]
    query = "SELECT avg(x.n) AS mean, min(r.started)::date AS day FROM v_measurement x JOIN v_run r ON r.key = x.key"
    (row,) = json.loads(zoo("catalog", "sql", query, "--runs", "--json")[1])
    assert (round(float(row["mean"]), 3), row["day"]) == (3.667, "2026-05-04")
    monkeypatch.setenv("ZOO_CATALOG", "postgresql+psycopg://me:secret@127.0.0.1:1/zoo")
    code, _, err = zoo("results")
    assert (code, err.count("\n")) == (2, 1)
    assert "secret" not in err


def test_sql_reads(zoo: Zoo) -> None:
    query = (
        "SELECT slug, year FROM v_method WHERE family LIKE '%weight-pruning%' AND implemented ORDER BY slug"
    )
    rows = json.loads(zoo("catalog", "sql", query, "--json")[1])
    assert {"slug": "flap", "year": 2023} in rows
    assert zoo("catalog", "sql", query)[1].splitlines()[0] == "slug\tyear"
    search = "SELECT count(*) AS n FROM method_fts WHERE method_fts MATCH 'pruning'"
    assert json.loads(zoo("catalog", "sql", search, "--json")[1])[0]["n"] > 5


def test_sql_sees_own_runs(zoo: Zoo) -> None:
    record_run(make_run(key="mine"))
    rows = json.loads(zoo("catalog", "sql", "SELECT key, model FROM own.v_run", "--json")[1])
    assert rows == [{"key": "mine", "model": "tiny-llama"}]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM method",
        "UPDATE method SET name = 'x'",
        "DROP TABLE method",
        "ATTACH 'elsewhere.sqlite' AS x",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = DELETE",
        "VACUUM INTO 'copy.sqlite'",
        "SELECT 1; DELETE FROM method",
        "SELECT nonsense FROM nowhere",
        "SELECT load_extension('x')",
        "",
    ],
)
def test_sql_cannot_write(
    zoo: Zoo, as_catalog: Path, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(as_catalog.parent)
    before = as_catalog.read_bytes()
    files = sorted(as_catalog.parent.iterdir())
    code, _, err = zoo("catalog", "sql", statement)
    assert (code == 2 and err.startswith("error: SQL: ") and err.count("\n") == 1) or statement == ""
    assert as_catalog.read_bytes() == before
    assert sorted(as_catalog.parent.iterdir()) == files


@pytest.mark.parametrize("what", ["methods", "papers", "claims", "terms", "measurements"])
def test_export(zoo: Zoo, what: str, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(zoo("catalog", "export", what)[1])))
    values = json.loads(zoo("catalog", "export", what, "-f", "json")[1])
    assert len(rows) == len(values) > 0
    target = tmp_path / "out.csv"
    assert zoo("catalog", "export", what, "-o", str(target)) == (0, "", "")
    assert list(csv.DictReader(target.open(encoding="utf-8", newline=""))) == rows


def test_export_bibtex(zoo: Zoo) -> None:
    methods = zoo("catalog", "export", "methods", "-f", "bibtex")[1]
    assert methods.count("@misc{") == len(queries.list_methods(queries.open_catalog(), kinds=queries.KINDS))
    papers = zoo("catalog", "export", "papers", "-f", "bibtex")[1]
    keys = [line for line in papers.splitlines() if line.startswith("@misc{")]
    assert len(keys) == len(set(keys)) == 3718
    assert zoo("catalog", "export", "terms", "-f", "bibtex")[0] == 2
    assert zoo("catalog", "export", "-o", "/no/such/folder/x.csv")[0] == 2


def test_results(zoo: Zoo) -> None:
    record_run(make_run(key="mine", started="2027-01-01T00:00:00Z"))
    record_run(make_run(key="broken", status="failed", error="NaN activations", measurements=()))
    rows = [line.split("\t") for line in zoo("results")[1].splitlines()]
    assert [row[1:4] for row in rows[1:]] == [
        ["flap", "tiny-llama", "done"],
        *[["flap", model, status] for model, status in (("smollm2-135m", "done"), ("tiny-llama", "failed"))],
    ]
    assert rows[1][4] == "prefill 2×"
    assert rows[3][4] == "NaN activations"
    own = json.loads(zoo("results", "flap", "--own", "--json")[1])
    assert [run["key"] for run in own] == ["mine", "broken"]
    assert json.loads(zoo("results", "--model", "none", "--json")[1]) == []
