"""Runs on tiny random models: nothing is fetched, nothing of the user's is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from offline_data import replace_data


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replaced data; returns the file of the test's own catalogue."""
    replace_data(monkeypatch)
    catalogue = tmp_path / "runs.sqlite"
    monkeypatch.setenv("ZOO_CATALOG", str(catalogue))
    return catalogue
