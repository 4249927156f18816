"""A sweep: the cells of a plan, run somewhere, stored as they come, and taken up again where they stopped."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from taxonomy.earlier import Earlier, earlier_runs
from taxonomy.runs import Run, RunStore, open_runs
from zoo.bench.plan import Cell
from zoo.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from zoo.bench.cells import Row, Watch

Place = Literal["local", "ray"]

SETTLED = ("done", "refused")
"""How cells ended that need not be run again: a method that said no will say it again."""


# --- before -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """How long cells will take.

    Attributes:
        seconds: of the cells that are like earlier ones, one after the other.
        known, unknown: cells that are, and that are not.
        runs: earlier runs that it rests on.
        hardware: where these were measured.
    """

    seconds: float
    known: int
    unknown: int
    runs: int
    hardware: tuple[str, ...]

    def said(self, workers: int = 1) -> str:
        """In a sentence."""
        if not self.known and not self.unknown:
            return "nothing is left to run"
        if not self.known:
            return "time: unknown, nothing like it has run here yet"
        rest = f", and {self.unknown} cells of unknown length" if self.unknown else ""
        shared = f" by {workers} workers" if workers > 1 else ""
        return (
            f"time: about {duration(self.seconds / workers)}{shared} for {self.known} cells{rest} "
            f"(medians of {self.runs} earlier runs of like cells on {'; '.join(self.hardware)})"
        )


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(cells: Sequence[Cell], earlier: Sequence[Earlier]) -> Estimate:
    """Time from earlier runs of the same cell; else of the method, model and task; else of model and task."""
    by: dict[tuple[Any, ...], list[Earlier]] = {}
    for one in earlier:
        if one.status == "done":
            for key in ((one.cell,), (one.method, one.model, one.task), (one.model, one.task)):
                by.setdefault(key, []).append(one)
    total, known = 0.0, 0
    used: dict[str, str] = {}
    for cell in cells:
        name = cell.task.name if cell.task.make() else None
        like = (
            by.get((cell.hash,))
            or by.get((cell.method, cell.model, name))
            or by.get((cell.model, name))
            or []
        )
        if like:
            known += 1
            total += statistics.median(one.seconds for one in like)
            used |= {one.key: one.hardware for one in like}
    return Estimate(total, known, len(cells) - known, len(used), tuple(sorted(set(used.values()))))


def settled(cells: Sequence[Cell], earlier: Sequence[Earlier], output: Path | None) -> dict[str, str]:
    """Status by hash of the cells that are finished, in the user's catalogue or in the file ``output``."""
    wanted = {cell.hash for cell in cells}
    found = {
        one.cell: one.status for one in earlier if one.own and one.cell in wanted and one.status in SETTLED
    }
    for row in _rows(output):
        mark = row.get("inputs", {}).get("cell")
        if mark in wanted and row.get("status") in SETTLED:
            found[mark] = row["status"]
    return {mark: status for mark, status in found.items() if mark is not None}


def _rows(output: Path | None) -> Iterator[dict[str, Any]]:
    """Lines of a file of runs; one that a crash cut off is left out."""
    if output is None or not output.is_file():
        return
    for line in output.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def earlier_like(cells: Sequence[Cell]) -> list[Earlier]:
    """Earlier runs on the models of ``cells``, the user's own and others'."""
    return earlier_runs({cell.model for cell in cells})


# --- during -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What has come of a sweep so far: rows by status, in the order in which they came."""

    planned: int
    rows: list[tuple[Cell, Mapping[str, Any]]] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Cells that ended so."""
        return sum(row["status"] == status for _, row in self.rows)

    def said(self) -> str:
        """``17 of 20 cells: 15 done, 1 failed, 1 refused``."""
        parts = [
            f"{self.count(status)} {status}" for status in ("done", "failed", "refused") if self.count(status)
        ]
        return f"{len(self.rows)} of {self.planned} cells" + (f": {', '.join(parts)}" if parts else "")


def sweep(
    cells: Sequence[Cell],
    tally: Tally,
    *,
    place: Place = "local",
    workers: int | None = None,
    output: Path | None = None,
    store: bool = True,
    watch: Watch | None = None,
    ended: Callable[[Cell, Row], None] | None = None,
) -> None:
    """Run ``cells``; every row is stored before the next one is waited for.

    Args:
        cells: what is to be run.
        tally: grows with every cell that ends, so that it can be read after Ctrl-C.
        place: this machine, or a Ray cluster.
        workers: processes; on this machine ``None`` runs everything in this process.
        output: a file that every row is appended to, as a line of JSON.
        store: keep every row in the user's catalogue.
        watch: told how each cell gets on.
        ended: called with each cell and its row, after they are stored.

    Raises:
        BadInput: ``output`` cannot be written, or nothing would be kept.
        CatalogError: the user's catalogue cannot be opened or written.
        KeyboardInterrupt: Ctrl-C. Cells that had ended are stored; those under way are as if never begun.
    """
    if not store and output is None:
        raise BadInput("nothing would be kept; name a file with --output, or leave out --no-record")
    with ExitStack() as stack:
        file = None if output is None else stack.enter_context(_Lines(output))
        runs: RunStore | None = stack.enter_context(open_runs()) if store else None
        found = stack.enter_context(closing(_rows_from(place, cells, workers, watch or (lambda *_: None))))
        for cell, row in found:
            if file is not None:
                file.add(row)
            if runs is not None:
                runs.record(Run.from_json(row))
            tally.rows.append((cell, row))
            if ended is not None:
                ended(cell, row)


def _rows_from(
    place: Place, cells: Sequence[Cell], workers: int | None, watch: Watch
) -> Generator[tuple[Cell, Row]]:
    if place == "ray":
        from zoo.bench.cluster import on_ray

        return on_ray(cells, workers, watch)
    if workers is not None:
        from zoo.bench.workers import in_workers

        return in_workers(cells, workers, watch)
    from zoo.bench.cells import in_this_process

    return in_this_process(cells, watch)


class _Lines:
    """A file that lines of JSON are appended to; each is on the disk before ``add`` returns."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadInput(f"the results cannot be written to {path}: {reason}") from None
        self._path = path
        if self._file.tell():  # a crash may have left half a line, which must not spoil the next one
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def add(self, row: Row) -> None:
        """Append a row."""
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise RunFailed(f"the results could not be written to {self._path}: {reason}") from None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
