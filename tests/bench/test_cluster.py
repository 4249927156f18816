"""A sweep on a Ray cluster that is started here, with two workers; one of them is killed midway."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_plans import stored

from zoo.bench.plan import Cell, Plan
from zoo.bench.sweep import Tally, sweep

pytest.importorskip("ray")


def at_work(mark: str) -> list[int]:
    """Processes of our cluster that are running a cell: Ray gives them a title, and they have our environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            running = b"RemoteWorkshop.run" in (folder / "cmdline").read_bytes()
            if running and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_lost_worker_loses_no_cell_and_none_counts_twice(
    plan: Callable[..., Plan], catalogue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the user's home
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cells = plan(models='["tiny-llama", "tiny-qwen2"]', seeds="[0, 1]").cells()
    killed: list[int] = []

    def kill_one(*_: Any) -> None:
        waited = time.monotonic()
        while not killed and time.monotonic() - waited < 10:
            for process in at_work(str(catalogue))[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    begun: list[str] = []

    def watch(cell: Cell, *_: Any) -> None:
        begun.append(cell.hash)

    tally = Tally(len(cells))
    sweep(cells, tally, place="ray", workers=2, watch=watch, ended=kill_one)
    assert killed
    assert tally.said() == f"{len(cells)} of {len(cells)} cells: {len(cells)} done"
    assert stored() == {(cell.hash, "done"): 1 for cell in cells}
    assert len(begun) == len(cells) + 1  # the cell of the lost worker was begun again
