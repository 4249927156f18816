"""Runs travel between catalogues: complete, once, with their provenance, and all or none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from catalog_fixtures import make_run

from taxonomy.catalog import open_runs, results
from taxonomy.errors import CatalogError
from taxonomy.exchange import document, import_runs, stored_runs


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Two runs of somebody else."""
    path = tmp_path / "theirs.json"
    runs = [
        make_run(key="a" * 32, report={"unit": "heads"}),
        make_run(key="b" * 32, method="cfsp+prompt-lookup"),
    ]
    path.write_text(document(runs))
    return path


def test_runs_arrive_complete_and_once(as_catalog: Path, export: Path, tmp_path: Path) -> None:
    assert import_runs(export).added == 2
    again = import_runs(export)
    assert (again.added, again.known) == (0, 2)
    (flap,) = [run for run in stored_runs(reference=False) if run.method == "flap"]
    assert flap.environment["imported"].startswith("theirs.json, sha256 ")
    sent = make_run(key="a" * 32, report={"unit": "heads"})
    back = replace(flap, environment={k: v for k, v in flap.environment.items() if k != "imported"})
    assert sorted(back.measurements, key=repr) == sorted(sent.measurements, key=repr)
    assert replace(back, measurements=()) == replace(sent, measurements=())
    assert {row.origin for row in results(reference=False)} == {"imported"}


def test_passed_on_it_keeps_its_first_source(as_catalog: Path, export: Path, tmp_path: Path) -> None:
    import_runs(export)
    onward = tmp_path / "onward.json"
    onward.write_text(document(stored_runs(reference=False)))
    elsewhere = str(tmp_path / "third.sqlite")
    assert import_runs(onward, elsewhere).added == 2
    sources = {run.environment["imported"] for run in stored_runs(reference=False, where=elsewhere)}
    assert all(source.startswith("theirs.json") for source in sources)
    assert import_runs(export, elsewhere).known == 2


def test_a_reference_run_is_not_counted_twice(as_catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(document(stored_runs()))
    assert import_runs(path).added == 0
    keys = [row.key for row in results(limit=None)]
    assert len(keys) == len(set(keys)) > 0


def test_lines_of_measurements_are_accepted(as_catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    path.write_text("\n".join(json.dumps(make_run(key=key).to_json()) for key in ("x", "y")) + "\n\n")
    assert import_runs(path).added == 2


def _edited(text: str, **changes: object) -> str:
    body = json.loads(text)
    body["runs"][1] |= changes
    return json.dumps(body)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[:-40], "is not JSON"),
        (lambda text: "", "holds no run"),
        (lambda text: "[1]", "is not a run"),
        (lambda text: '{"runs": [], "format": "other"}', "not an export of runs"),
        (lambda text: text.replace('"version": 1', '"version": 2', 1), "version 2; this zoo reads 1"),
        (lambda text: _edited(text, status="great"), "run 2: status 'great'"),
        (lambda text: _edited(text, sparkle=1), "run 2: .*sparkle"),
        (lambda text: _edited(text, model="\x1b[31mred"), "control characters"),
        (lambda text: _edited(text, key="a" * 32), "stored with other content"),
    ],
)  # fmt: skip
def test_one_wrong_run_imports_none(as_catalog: Path, export: Path, spoil: object, said: str) -> None:
    export.write_text(spoil(export.read_text()))  # type: ignore[operator]
    with pytest.raises(CatalogError, match=said):
        import_runs(export)
    with open_runs():
        assert stored_runs(reference=False) == []


def test_a_stored_run_cannot_be_overwritten(as_catalog: Path, export: Path, tmp_path: Path) -> None:
    import_runs(export)
    body = json.loads(export.read_text())
    body["runs"][0]["measurements"][1]["median"] = 0.001
    export.write_text(json.dumps(body))
    with pytest.raises(CatalogError, match="one of the two was edited"):
        import_runs(export)
    with pytest.raises(CatalogError, match="cannot be read"):
        import_runs(tmp_path / "missing.json")
