"""Shared fixtures. Tests import the helpers beside this file by plain name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Tests run in parallel processes; more threads per process only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_RECORDED = pytest.StashKey[list[dict[str, object]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write verified properties and golden cases down")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDED] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    rows = session.config.stash[_RECORDED]
    if not session.config.getoption("--record") or not rows:
        return
    from taxonomy.paths import VERIFICATION

    Path(VERIFICATION).mkdir(exist_ok=True)
    for name, kinds in {"contracts": {"property", "facet"}, "golden": {"golden"}}.items():
        chosen = sorted(json.dumps(row, sort_keys=True) for row in rows if row["kind"] in kinds)
        if chosen:
            (Path(VERIFICATION) / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


@pytest.fixture
def record_verified(request: pytest.FixtureRequest) -> Callable[[str, str, str, str], None]:
    """Call at the end of a passing check: ``(method, kind, subject, model)``."""

    def record(method: str, kind: str, subject: str, model: str) -> None:
        request.config.stash[_RECORDED].append(
            {"method": method, "kind": kind, "subject": subject, "model": model, "passed": True}
        )

    return record
