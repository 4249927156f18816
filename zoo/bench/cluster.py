"""Running the cells of a plan on a Ray cluster (https://www.ray.io; extra ``ray``).

``RAY_ADDRESS`` names the cluster; without it one is started on this machine for the time of the sweep. Its machines
need the same version of the zoo. A worker that is lost (machines of clusters come and go) costs one more attempt at
its cell; the second time the cell is marked as failed. Only this process stores results, so none is counted twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator, Sequence
from datetime import datetime, timezone
from typing import Any

from zoo.bench.cells import Row, Watch, Workshop, failed_row, overtime
from zoo.bench.plan import Cell
from zoo.bench.workers import Queue
from zoo.errors import NeedsExtra, RunFailed

ATTEMPTS = 2
_TICK = 0.5
"""Seconds between looks at the clock."""
_GRACE = 60.0
"""Seconds beyond the time-out, for starting a worker."""


class RemoteWorkshop:
    """A ``Workshop`` somewhere in the cluster; cells and rows travel as JSON."""

    def __init__(self) -> None:
        self._workshop = Workshop()

    def run(self, cell: str) -> str:
        """Measure a cell."""
        row = self._workshop.run(Cell.model_validate_json(cell), lambda *_: None)
        return json.dumps(row, allow_nan=False)


class _Remote:
    """An actor, and the cell it is at."""

    def __init__(self, make: Any) -> None:
        self.actor = make.remote()
        self.cell: Cell | None = None
        self.group: str | None = None
        self.answer: Any = None
        self.handed = 0.0
        self.started = ""

    def hand(self, cell: Cell) -> None:
        """Give it a cell."""
        self.cell, self.group = cell, cell.group
        self.handed = time.monotonic()
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.answer = self.actor.run.remote(cell.model_dump_json())

    @property
    def late(self) -> bool:
        """Whether its cell has had all its time, and that for starting a process somewhere."""
        limit = None if self.cell is None else self.cell.settings.timeout
        return limit is not None and time.monotonic() - self.handed > limit + _GRACE

    def failed(self, reason: str) -> Row:
        """The row of its cell, which nobody will finish."""
        assert self.cell is not None
        return failed_row(self.cell, RunFailed(reason), self.started, time.monotonic() - self.handed)


def on_ray(cells: Sequence[Cell], count: int | None, watch: Watch) -> Generator[tuple[Cell, Row]]:
    """Run the cells on a cluster; yields each cell with its row as it ends. Closing it ends the workers.

    Args:
        cells: in the order in which they are handed out.
        count: workers; ``None`` = one per GPU of the cluster, or per processor core where it has none.
        watch: told when a cell begins.

    Raises:
        NeedsExtra: Ray is not installed.
        RunFailed: the cluster cannot be reached or started.
    """
    try:
        import ray
        from ray.exceptions import RayActorError
    except ImportError:
        raise NeedsExtra("--on ray needs Ray; install it with: pip install 'efficiency-zoo[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, count)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = min(count or gpus or int(ray.cluster_resources().get("CPU", 1)), len(cells))
    make = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=0)(RemoteWorkshop)
    queue, attempts = Queue(cells), dict.fromkeys((cell.hash for cell in cells), 0)
    remotes: list[_Remote] = []
    try:
        remotes += [_Remote(make) for _ in range(count)]
        while queue or any(remote.cell for remote in remotes):
            for remote in remotes:
                if remote.cell is None and queue:
                    busy_with = {other.cell.group for other in remotes if other.cell}
                    remote.hand(queue.take(remote.group, busy_with))
                    assert remote.cell is not None
                    attempts[remote.cell.hash] += 1
                    watch(remote.cell, "on the cluster", 0, 0)
            busy = {remote.answer: remote for remote in remotes if remote.cell}
            for answer in ray.wait(list(busy), timeout=_TICK)[0]:
                remote = busy[answer]
                cell = remote.cell
                assert cell is not None
                try:
                    row = json.loads(ray.get(answer))
                except RayActorError:
                    remotes[remotes.index(remote)] = _Remote(make)
                    if attempts[cell.hash] < ATTEMPTS:
                        queue.put_back(cell)
                        continue
                    row = remote.failed(f"its worker on the cluster was lost {ATTEMPTS} times")
                remote.cell = None
                yield cell, row
            for remote in [remote for remote in remotes if remote.late]:
                cell = remote.cell
                assert cell is not None
                row = remote.failed(overtime(cell.settings.timeout or 0))
                ray.kill(remote.actor)
                remotes[remotes.index(remote)] = _Remote(make)
                yield cell, row
    finally:
        for remote in remotes:
            ray.kill(remote.actor)
        if ours:
            ray.shutdown()


def _connect(ray: Any, count: int | None) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start one here with room for ``count`` workers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about our users is sent anywhere
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"num_cpus": count, "include_dashboard": False}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise RunFailed(f"Ray could not be started or reached: {str(error).splitlines()[0]}") from None
