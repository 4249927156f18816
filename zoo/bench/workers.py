"""Running the cells of a plan in worker processes of this machine.

A worker that dies (out of memory, a crash in native code) or takes too long costs the cell it was at and nothing else:
that cell is marked, and a new worker takes the next one. Workers only compute; what they find goes through a pipe, as
JSON, to the one process that stores it.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Generator, Sequence
from datetime import datetime, timezone
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from zoo.bench.cells import Row, Watch, Workshop, failed_row, overtime
from zoo.bench.plan import Cell
from zoo.errors import RunFailed

_TICK = 0.5
"""Seconds between looks at the clock."""
_GRACE = 2.0
"""Seconds beyond the time-out in which a worker that can end its cell by itself, and stay, does so."""
_PAUSE = 0.2
"""Seconds between two messages of progress."""


class Queue:
    """Cells still to be run. A worker gets one of the group it has been at, or of one that nobody is at."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = list(cells)

    def __bool__(self) -> bool:
        return bool(self._cells)

    def take(self, own: str | None, others: set[str]) -> Cell:
        """The next cell for a worker whose last group is ``own`` while others are at ``others``."""
        same = (cell for cell in self._cells if cell.group == own)
        free = (cell for cell in self._cells if cell.group not in others)
        cell = next(same, None) or next(free, None) or self._cells[0]
        self._cells.remove(cell)
        return cell

    def put_back(self, cell: Cell) -> None:
        """Make ``cell`` the next one."""
        self._cells.insert(0, cell)


class _Worker:
    """A process, the pipe to it, and the cell it is at."""

    def __init__(self, number: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, number, count), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.number, self.count = number, count
        self.cell: Cell | None = None
        self.group: str | None = None
        self.handed, self.begun = 0.0, 0.0
        self.started = ""

    def hand(self, cell: Cell) -> None:
        """Give it a cell."""
        self.cell, self.group = cell, cell.group
        self.handed, self.begun = time.monotonic(), 0.0
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _send(self.connection, cell.model_dump(mode="json"))

    @property
    def late(self) -> bool:
        """Whether its cell has had all its time; starting the process does not count."""
        limit = None if self.cell is None else self.cell.settings.timeout
        return limit is not None and self.begun > 0 and time.monotonic() - self.begun > limit + _GRACE

    def failed(self, reason: str) -> Row:
        """The row of its cell, which nobody will finish."""
        assert self.cell is not None
        return failed_row(self.cell, RunFailed(reason), self.started, time.monotonic() - self.handed)

    def stop(self) -> None:
        """End the process, whatever it is doing; its cell is no longer its own."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.cell = None

    def last_words(self) -> str:
        """How the process ended."""
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            return "its worker process was killed (SIGKILL: the system does that when memory runs out)"
        if code < 0:
            return f"its worker process crashed ({signal.Signals(-code).name})"
        return f"its worker process ended with exit code {code}"


def in_workers(cells: Sequence[Cell], count: int, watch: Watch) -> Generator[tuple[Cell, Row]]:
    """Run the cells in ``count`` processes; yields each cell with its row as it ends. Closing it ends the processes."""
    queue = Queue(cells)
    workers = [_Worker(number, count) for number in range(min(count, len(cells)))]
    try:
        while queue or any(worker.cell for worker in workers):
            for place, worker in enumerate(workers):
                if worker.cell is None and queue:
                    if not worker.process.is_alive():
                        worker = workers[place] = _replace(worker)
                    worker.hand(queue.take(worker.group, _groups(workers, worker)))
            busy = {worker.connection: worker for worker in workers if worker.cell}
            for connection in wait(list(busy), timeout=_TICK):
                worker = busy[cast(Connection, connection)]
                cell = worker.cell
                assert cell is not None
                try:
                    message = _receive(worker.connection)
                except (EOFError, OSError):
                    row = worker.failed(worker.last_words())
                    worker.stop()
                    yield cell, row
                    continue
                worker.begun = worker.begun or time.monotonic()
                if "row" in message:
                    worker.cell = None
                    yield cell, message["row"]
                else:
                    watch(cell, *message["progress"])
            for worker in [worker for worker in workers if worker.late]:
                cell = worker.cell
                assert cell is not None
                row = worker.failed(overtime(cell.settings.timeout or 0))
                worker.stop()
                yield cell, row
    finally:
        for worker in workers:
            worker.stop()


def _groups(workers: Sequence[_Worker], but: _Worker) -> set[str]:
    """What the other workers are at."""
    return {worker.cell.group for worker in workers if worker is not but and worker.cell}


def _replace(worker: _Worker) -> _Worker:
    worker.stop()
    return _Worker(worker.number, worker.count)


def serve(connection: Connection, number: int, count: int) -> None:
    """What a worker does: take a cell, tell of its progress, give its row, until the pipe ends.

    The machine's cores are shared out evenly, and so are its GPUs.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the one with the terminal decides
    import torch

    from zoo.bench.environment import usable_cores

    torch.set_num_threads(max(1, usable_cores() // count))
    gpus = torch.cuda.device_count()
    workshop = Workshop(f"cuda:{number % gpus}" if gpus > 1 else None)
    while True:
        try:
            cell = Cell.model_validate(_receive(connection))
        except (EOFError, OSError):
            return

        tell = _Teller(connection)
        tell("beginning", 0, 0)
        _send(connection, {"row": workshop.run(cell, tell)})


class _Teller:
    """Tells of progress a few times a second at most: a full pipe would hold up what is being measured."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last > _PAUSE:
            self._last = now
            _send(self._connection, {"progress": [what, done, total]})


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message, allow_nan=False).encode())


def _receive(connection: Connection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message
