"""Building is deterministic, writes only what changed, and ``check`` says what differs."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from catalog_fixtures import card, make_run, real_sources, small
from pydantic import BaseModel, ConfigDict, Field

from taxonomy import files
from taxonomy.catalog import Sources, build, built_bytes, check, parameters_of
from taxonomy.errors import CardError, CatalogError
from taxonomy.runs import canonical_json
from taxonomy.vocabulary import FACETS, PROPERTIES


def test_same_sources_same_bytes() -> None:
    sources = real_sources()
    assert built_bytes(sources) == built_bytes(sources)


def test_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib; from catalog_fixtures import card, small; from taxonomy.catalog import built_bytes; "
        "print(hashlib.sha256(built_bytes(small(card(), card(slug='beta')))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


def test_order_of_cards_does_not_matter() -> None:
    one, other = card(), card(slug="beta", name="Beta")
    assert built_bytes(small(one, other)) == built_bytes(small(other, one))


def test_unchanged_build_writes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    assert build(small(), target)
    before = target.stat()
    assert not build(small(), target)
    after = target.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert build(small(card(year=2023)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.sqlite"]  # nothing is left aside


def test_readers_keep_the_file_they_opened(tmp_path: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    build(small(), target)
    reader = files.connect(target, immutable=True)
    build(small(card(name="Renamed")), target)
    assert reader.execute("SELECT name FROM method").fetchall() == [("Alpha",)]
    assert files.connect(target, immutable=True).execute("SELECT name FROM method").fetchone() == ("Renamed",)


def test_file_is_ours_sound_and_stamped(built: Path) -> None:
    db = files.connect(built, immutable=True)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert db.execute("SELECT value FROM meta WHERE key = 'sources'").fetchone() == (real_sources().digest(),)
    assert db.execute("SELECT version_num FROM alembic_version").fetchone() == (files.REVISION,)
    for name in ("method_fts", "paper_fts"):
        writable = sqlite3.connect(":memory:")
        db.backup(writable)
        writable.execute(f"INSERT INTO {name}({name}, rank) VALUES ('integrity-check', 1)")


def test_everything_on_the_cards_is_in_the_file(built: Path) -> None:
    sources = real_sources()
    db = files.connect(built, immutable=True)

    def count(table: str) -> int:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    cards = sources.cards.values()
    assert count("method") == len(sources.cards) > 100
    assert count("paper") == len(sources.papers) == 3718
    assert count("claim") == sum(len(card.claims) for card in cards)
    assert count("method_term") == sum(len(terms) for card in cards for terms in card.facets.values())
    assert count("method_property") == sum(len(card.properties) for card in cards)
    assert count("related") == sum(len(card.related) for card in cards)
    assert count("method WHERE implemented") == len(sources.implemented & sources.cards.keys()) > 0
    assert count("term") == sum(len(facet.terms) for facet in FACETS.values())


def test_flat_view_has_a_column_per_facet_and_property(built: Path) -> None:
    db = files.connect(built, immutable=True)
    cursor = db.execute("SELECT * FROM v_method WHERE slug = 'flap'")
    row = dict(zip((column[0] for column in cursor.description), cursor.fetchone(), strict=True))
    flap = real_sources().cards["flap"]
    assert row.keys() >= FACETS.keys() | PROPERTIES.keys()
    assert row["target"] == ",".join(flap.facets["target"])
    assert row["query_aware"] == flap.properties["query_aware"]


def test_papers_are_linked_by_slug_and_by_arxiv(built: Path) -> None:
    db = files.connect(built, immutable=True)
    query = "SELECT p.arxiv FROM paper p JOIN method_paper l ON l.paper = p.id WHERE l.method = 'flap'"
    assert db.execute(query).fetchall() == [("2312.11983",)]


def test_parameters_are_stored(tmp_path: Path) -> None:
    class Settings(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)

        keep_ratio: float = Field(0.5, gt=0, le=1, description="Fraction\n kept.")
        layers: list[int] | None = None
        mode: Literal["greedy", "sample"] = "greedy"
        weights: sqlite3.Connection | None = None
        steps: int

    rows = {row.name: row for row in parameters_of(Settings)}
    assert list(rows) == ["keep_ratio", "layers", "mode", "weights", "steps"]
    assert rows["keep_ratio"].type == "number > 0, <= 1"
    assert (rows["keep_ratio"].default, rows["keep_ratio"].description) == (0.5, "Fraction kept.")
    assert rows["layers"].type == "list of integer | none"
    assert rows["mode"].type == "greedy | sample"
    assert rows["steps"].required
    assert not rows["weights"].required
    target = tmp_path / "catalog.sqlite"
    build(small(parameters={"alpha": list(rows.values())}), target)
    db = files.connect(target, immutable=True)
    stored = db.execute('SELECT name, "default" FROM parameter ORDER BY position').fetchall()
    assert stored == [
        ("keep_ratio", "0.5"),
        ("layers", "null"),
        ("mode", '"greedy"'),
        ("weights", "null"),
        ("steps", None),
    ]


def test_check_agrees_with_build_and_names_what_changed(tmp_path: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    build(small(card(), card(slug="beta")), target)
    assert check(small(card(), card(slug="beta")), target) is None
    said = check(small(card(year=2023), card(slug="gamma")), target)
    assert said is not None
    assert "\n" not in said
    assert "table method has changed 1 row (alpha)" in said
    assert "lacks 1 row (gamma)" in said
    assert "has too many 1 row (beta)" in said
    assert "zoo catalog build" in said


def test_check_sees_an_edit_and_a_changed_definition(tmp_path: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    build(small(), target)
    with sqlite3.connect(target) as db:
        db.execute("UPDATE method SET summary = 'edited'")
    assert "table method has changed 1 row (alpha)" in (check(small(), target) or "")
    build(small(), target)
    with sqlite3.connect(target) as db:
        db.execute("DROP VIEW v_claim")
    assert "the definition of v_claim changed" in (check(small(), target) or "")
    build(small(), target)
    with sqlite3.connect(target) as db:  # same rows, other bytes
        db.execute("PRAGMA user_version = 7")
    assert "other bytes" in (check(small(), target) or "")


def test_missing_damaged_and_foreign_files(tmp_path: Path, built: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    with pytest.raises(CatalogError, match="zoo catalog build"):
        check(small(), target)
    target.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(CatalogError, match="damaged"):
        files.connect(target)
    target.write_bytes(built.read_bytes()[:200_000])
    with pytest.raises(CatalogError, match="damaged"):
        check(small(), target)
    target.unlink()
    with sqlite3.connect(target) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(CatalogError, match="not a catalogue of the zoo"):
        files.connect(target)


def test_a_newer_schema_is_refused(tmp_path: Path, built: Path) -> None:
    target = tmp_path / "catalog.sqlite"
    shutil.copy(built, target)
    with sqlite3.connect(target) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(CatalogError, match=r"newer zoo .*9999.* upgrade"):
        files.connect(target)


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CatalogError, match="cannot be written"):
        build(small(), blocker / "catalog.sqlite")


def test_contradictions_are_one_line(tmp_path: Path) -> None:
    row = {"method": "nobody", "kind": "golden", "subject": "case", "passed": True}
    with pytest.raises(CatalogError, match="no card 'nobody'"):
        built_bytes(small(verification=[row]))
    twice = {**row, "method": "alpha"}
    with pytest.raises(CatalogError, match="contradict each other in table verification"):
        built_bytes(small(verification=[twice, twice]))
    folder = tmp_path / "cards"
    folder.mkdir()
    (folder / "alpha.toml").write_text("slug = ")
    with pytest.raises(CardError, match=r"alpha\.toml"):
        Sources.load(cards=folder)


def test_measurements_and_verification_are_read_from_text(tmp_path: Path) -> None:
    run = make_run(key="k1")
    for name, line in (("measurements", canonical_json(run.to_json())), ("verification", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(line + "\n")
    (tmp_path / "verification" / "b.jsonl").write_text(
        '{"method": "flap", "kind": "golden", "subject": "case", "passed": true}\n'
    )
    places = {name: tmp_path / name for name in ("measurements", "verification")}
    sources = Sources.load(**places)
    assert sources.runs == [run]
    assert len(sources.verification) == 1
    (tmp_path / "verification" / "b.jsonl").write_text('{"method": "flap", "kind": "golden", "subject": 3}\n')
    with pytest.raises(CatalogError, match=r"verification/b\.jsonl line 1: 'subject'"):
        Sources.load(**places)
    (tmp_path / "measurements" / "a.jsonl").write_text('{"method": "flap"}\n')
    with pytest.raises(CatalogError, match=r"measurements/a\.jsonl line 1: 'key'"):
        Sources.load(**places)
