"""Running the cells of a plan, one at a time, in this process. Whatever goes wrong becomes a row that says so."""

from __future__ import annotations

import gc
import signal
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from taxonomy.runs import TRIAL, Run
from zoo.bench.environment import environment
from zoo.bench.plan import Cell
from zoo.bench.record import PROTOCOL
from zoo.bench.tasks import Kept
from zoo.errors import BadInput, BadParameter, Refused, RunFailed, ZooError
from zoo.interface import method as make_method
from zoo.interface import method_class
from zoo.models import LoadedModel
from zoo.models.loading import load_model
from zoo.runner import Request, run, stored_form

Row = dict[str, Any]
"""A run in the form of ``taxonomy.runs.Run.to_json``."""

Progress = Callable[[str, int, int], None]
Watch = Callable[[Cell, str, int, int], None]
"""Called with a cell, what is being done for it, and how many of how many steps of that are finished."""


class Workshop:
    """Runs cells and keeps what the next one may use: the model, what was made of it, and its own answers.

    Args:
        device: where models go whose cell names no device.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._key: tuple[str | None, ...] | None = None
        self._loaded: LoadedModel | None = None
        self._kept = Kept()

    def run(self, cell: Cell, progress: Progress) -> Row:
        """Measure a cell. What fails or is refused comes back as a row with that status and the reason."""
        started, begun = _now(), time.perf_counter()
        try:
            with time_limit(cell.settings.timeout):
                loaded = self._model(cell, progress)
                record = run(
                    make_method(cell.method, **cell.parameters),
                    loaded,
                    request_of(cell),
                    settings=cell.settings.measuring,
                    progress=progress,
                    kept=self._kept,
                )
            row = {**stored_form(record), "inputs": {**record.inputs, "cell": cell.hash, TRIAL: cell.trial}}
            Run.from_json(row)  # what cannot be stored is found here, where it costs this cell only
        except Exception as error:
            self._kept = Kept()  # may be what filled the memory
            if not isinstance(error, BadInput):  # whatever was cut short may have left the model half changed
                self._loaded = None
            return failed_row(cell, error, started, time.perf_counter() - begun)
        return row

    def _model(self, cell: Cell, progress: Progress) -> LoadedModel:
        """The cell's model; the last one leaves memory first when it is another."""
        settings = cell.settings
        key = (cell.model, settings.device or self._device, settings.dtype, settings.device_map)
        if self._loaded is None or self._key != key:
            self._loaded, self._kept = None, Kept()
            gc.collect()
            progress(f"loading {cell.model}", 0, 0)
            self._loaded = load_model(key[0] or "", device=key[1], dtype=key[2], device_map=key[3])
            self._key = key
        return self._loaded


def request_of(cell: Cell) -> Request:
    """What ``zoo.run`` is asked for; of text, pictures and calibration what the methods take."""
    settings = cell.settings
    phases = {method_class(slug.strip()).phase for slug in cell.method.split("+")}
    return Request(
        prompt=settings.text if phases != {"encoder-tokens"} else None,
        images=settings.images if phases & {"visual-tokens", "encoder-tokens"} else (),
        calibration=settings.calibration if "weights" in phases else None,
        calibration_windows=settings.calibration_windows,
        draft=cell.draft,
        seed=cell.seed,
        task=cell.task.make(),
        store=False,
    )


def failed_row(cell: Cell, error: Exception, started: str, seconds: float) -> Row:
    """The row of a cell that could not be measured: ``refused`` when the method says no, else ``failed``."""
    if isinstance(error, ZooError):
        reason = str(error)
    else:  # a bug, or a library's own error: its kind says more than its words
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return {
        "key": uuid.uuid4().hex,
        "method": make_method(cell.method, **cell.parameters).name,
        "parameters": make_method(cell.method, **cell.parameters).parameters(),
        "model": cell.model,
        "started": started,
        "seconds": round(seconds, 3),
        "environment": environment(_device(cell)),
        "inputs": {"cell": cell.hash, "task": cell.task.complete},
        "seed": cell.seed,
        "status": "refused" if isinstance(error, Refused | BadParameter) else "failed",
        "error": reason,
        "protocol": PROTOCOL,
    }


def _device(cell: Cell) -> str:
    """Where the cell would have run, as far as this process can tell."""
    import torch

    wanted = cell.settings.device or "cuda"
    return wanted if wanted.startswith("cuda") and torch.cuda.is_available() else "cpu"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise ``RunFailed`` inside the block when it takes longer.

    It works in the main thread of systems with timers of their own, and between the operations of Python: one endless
    operation, and other systems, need a worker process. It is raised again every second, since what is raised while
    Python collects garbage is lost.
    """
    if (
        seconds is None
        or threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, "setitimer")
    ):
        yield
        return

    def ring(*_: object) -> None:
        raise RunFailed(overtime(seconds))

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def overtime(seconds: float) -> str:
    """Why a cell was given up."""
    return f"it took longer than {seconds:g} s; raise the plan's timeout or make the cell smaller"


def in_this_process(cells: Sequence[Cell], watch: Watch) -> Generator[tuple[Cell, Row]]:
    """Run the cells one after the other; yields each with its row."""
    workshop = Workshop()
    for cell in cells:
        yield cell, workshop.run(cell, lambda *at, cell=cell: watch(cell, *at))
