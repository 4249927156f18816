"""Plans on tiny random models; nothing is fetched, nothing of the user's is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_plans import Making

from zoo.bench.plan import Plan, load_plan


@pytest.fixture(autouse=True)
def catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The test's own catalogue; worker processes inherit it."""
    place = tmp_path / "runs.sqlite"
    monkeypatch.setenv("ZOO_CATALOG", str(place))
    return place


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text to predict and to calibrate on, in place of the packaged one."""
    file = tmp_path / "tale.txt"
    lines = [f"The {n}th fox jumps over dog number {n * n}, and runs away from it." for n in range(120)]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def write_plan(tmp_path: Path, text: Path) -> Making:
    """Write a plan file: ``write_plan(methods=[...])``; what is left out is small and quick."""

    def write(**changes: str) -> Path:
        values = {
            "name": '"test"',
            "models": '["tiny-llama"]',
            "methods": '["magnitude-sp", "prompt-lookup"]',
            "budgets": "[0.2, 0.5]",
            "tasks": f'[{{ name = "perplexity", length = 16, tokens = 64, text = "{text}" }}]',
            "settings": f'{{ calibration = "{text}", calibration_windows = 2 }}',
            **changes,
        }
        file = tmp_path / "plan.toml"
        file.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")
        return file

    return write


@pytest.fixture
def plan(write_plan: Making) -> Callable[..., Plan]:
    """The same, read."""
    return lambda **changes: load_plan(write_plan(**changes))
