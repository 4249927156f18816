"""Reading commands are quick because they import little: checked in fresh processes, by the names of the modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy", "sqlalchemy", "alembic", "jinja2")
ROOT = Path(__file__).parents[2]

PROBE = """
import json, sys
from pathlib import Path
from taxonomy import paths
catalog, *arguments = json.loads(sys.argv[1])
paths.catalog_file = lambda: Path(catalog)
try:
    if arguments and arguments[0] == "import":
        __import__(arguments[1])
    else:
        from zoo.cli import main
        main(arguments)
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + json.dumps(sorted(sys.modules)))
"""


def modules(built: Path, tmp_path: Path, *arguments: str) -> set[str]:
    """Top-level modules in memory after a command."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([str(built), *arguments])],
        env={**environment, "PYTHONPATH": str(ROOT), "ZOO_CATALOG": str(tmp_path / "runs.sqlite")},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("list",),
        ("find", "--where", "before-llm", "--no-needs-attention-maps"),
        ("search", "cache"),
        ("show", "flap"),
        ("compare", "flap", "cfsp"),
        ("papers", "merging"),
        ("taxonomy", "tree"),
        ("taxonomy", "matrix"),
        ("taxonomy", "terms"),
        ("taxonomy", "gaps"),
        ("catalog", "path"),
        ("catalog", "sql", "SELECT 1"),
        ("catalog", "export"),
        ("export", "claims"),
        ("pareto",),
        ("eval", "--help"),
        ("recommend", "--model", "llama", "--for", "prefill"),
        ("import", "zoo"),
        ("import", "taxonomy"),
        ("import", "taxonomy.queries"),
    ],
    ids=" ".join,
)
def test_reading_imports_nothing_heavy(built: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    assert not modules(built, tmp_path, *command) & set(HEAVY)


@pytest.mark.parametrize(
    "command", [("results",), ("import", "zoo.interface"), ("import", "taxonomy.catalog")], ids=" ".join
)
def test_the_rest_of_the_knowledge_half_knows_no_torch(
    built: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    loaded = modules(built, tmp_path, *command)
    assert not loaded & {"torch", "transformers", "alembic"}


def test_alembic_is_imported_only_for_an_upgrade(built: Path, tmp_path: Path) -> None:
    assert "alembic" not in modules(built, tmp_path, "import", "taxonomy.runs")


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("zoo show fla", 2, {"flap"}),
        ("zoo find --where before", 3, {"before-llm"}),
        ("zoo sho", 1, {"show"}),
        ("zoo compare flap fastv", 3, {"fastv"}),
    ],
)
def test_shell_completion(words: str, position: int, expected: set[str], built: Path) -> None:
    if not (ROOT / "catalog.sqlite").is_file():
        pytest.skip("completion reads the catalogue of the checkout, which is not built")
    done = subprocess.run(
        [sys.executable, "-m", "zoo"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_ZOO_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) >= expected
    assert all(word.startswith(words.split()[-1]) for word in done.stdout.split())


def test_a_reader_that_leaves_is_no_error(built: Path) -> None:
    """``zoo papers | head -1``: no traceback."""
    code = (
        "from pathlib import Path; from taxonomy import paths; "
        f"paths.catalog_file = lambda: Path({str(built)!r}); "
        "from zoo.cli import main; main(['papers', '--limit', '3000'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) in (1, 141)
