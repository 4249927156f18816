"""``zoo bench``: a thin shell around ``zoo.bench.plan`` and ``zoo.bench.sweep``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.output import Column, Json, counted, print_json, print_table
from zoo.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from zoo.bench.plan import Cell


class Where(str, Enum):
    """Where cells run."""

    local = "local"
    ray = "ray"


def bench(
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN.toml", help="The plan; examples are in plans/.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and the time they will take, and stop.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the cells that are done; run the failed ones again.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-w",
            min=1,
            help="Run in so many processes, where a crash costs one cell. Default: in this one.",
        ),
    ] = None,
    on: Annotated[
        Where, typer.Option("--on", help="This machine, or the Ray cluster of RAY_ADDRESS (or a local one).")
    ] = Where.local,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also append each result to this JSONL file."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="In place of the plan's.")] = None,
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", help="auto: spread models over several devices, with accelerate."),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="In place of the plan's.")] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds per cell, in place of the plan's.")
    ] = None,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Do not store results in your catalogue.")
    ] = False,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="List the tasks a plan can ask for, and stop.")
    ] = False,
    as_json: Json = False,
    *,
    context: typer.Context,
) -> None:
    """Measure methods x models x budgets x tasks x seeds, as a plan says.

    Every cell is stored as it ends. One that fails is marked, and the rest go on; Ctrl-C loses only what is under way.
    """
    from zoo.bench.plan import load_plan

    if tasks:
        _list_tasks(as_json)
        return
    if plan is None:
        raise BadInput("name a plan, as in zoo bench plans/tiny.toml; --tasks lists what it can ask for")
    chosen = load_plan(plan)
    given = {"device": device, "device_map": device_map, "dtype": dtype, "timeout": timeout}
    changed = {name: value for name, value in given.items() if value is not None}
    settings = chosen.settings.model_validate(chosen.settings.model_dump() | changed)
    cells = chosen.model_copy(update={"settings": settings}).cells()

    from zoo.bench.sweep import Tally, earlier_like, estimate, settled, sweep

    earlier = earlier_like(cells)
    ready = settled(cells, earlier, output) if resume or dry_run else {}
    pending = [cell for cell in cells if cell.hash not in ready]
    expected = estimate(pending, earlier)
    if dry_run:
        _show_plan(cells, ready, expected.said(workers or 1), as_json)
        return
    notes = [f"{counted(len(cells), 'cell')}"]
    if ready:
        notes.append(f"{len(ready)} done before")
    notes.append(expected.said(workers or 1))
    typer.echo("; ".join(notes), err=True)
    if not pending:
        return
    tally, interrupted = Tally(len(pending)), False
    with _progress(len(pending)) as screen:
        try:
            sweep(
                pending,
                tally,
                place=on.value,
                workers=workers,
                output=output,
                store=not no_record,
                watch=screen.watch,
                ended=screen.ended,
            )
        except KeyboardInterrupt:
            interrupted = True
    if as_json:
        print_json([{"label": cell.label, **row} for cell, row in tally.rows])
    typer.echo(tally.said(), err=True)
    if interrupted:
        typer.echo(f"interrupted: what had ended is stored; go on with: {_again(context)}", err=True)
        raise typer.Exit(130)
    if tally.count("failed"):
        typer.echo(f"run the failed cells again with: {_again(context)}", err=True)
        raise typer.Exit(1)


def _again(context: typer.Context) -> str:
    """The command with the options it had, that takes up what is left."""
    words = ["zoo", "bench"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        given = value.value if isinstance(value, Enum) else value
        if given in (None, False) or given == parameter.default or parameter.name == "resume":
            continue
        words += [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
        words += [] if given is True else [str(given)]
    return shlex.join([*words, "--resume"])


class _Screen:
    """Progress on standard error: a bar over all cells and a line per cell under way; plain lines elsewhere."""

    def __init__(self, console: Console, bars: Any) -> None:
        self._console, self._bars = console, bars
        self._total = None if bars is None else bars.tasks[0].id
        self._lines: dict[str, Any] = {}

    def watch(self, cell: Cell, what: str, done: int, total: int) -> None:
        """Show how a cell gets on."""
        if self._bars is None:
            return
        if cell.hash not in self._lines:
            self._lines[cell.hash] = self._bars.add_task(cell.label, total=None)
        line = self._lines[cell.hash]
        self._bars.update(line, description=f"{cell.label}: {what}", completed=done, total=total or None)
        self._bars.refresh()

    def ended(self, cell: Cell, row: dict[str, Any]) -> None:
        """Leave a line that says what came of a cell."""
        from rich.text import Text

        signs = {"done": ("ok", "green"), "refused": ("--", "yellow")}
        sign, colour = signs.get(row["status"], ("!!", "bold red"))
        told = row["error"] if row.get("error") else _figures(row)
        text = Text.assemble(
            (sign, colour), f" {cell.label}: ", (told, ""), (f"  {row['seconds']:.1f} s", "dim")
        )
        self._console.print(text, soft_wrap=True)
        if self._bars is not None:
            line = self._lines.pop(cell.hash, None)
            if line is not None:
                self._bars.remove_task(line)
            self._bars.advance(self._total)
            self._bars.refresh()


@contextmanager
def _progress(total: int) -> Iterator[_Screen]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Screen(console, None)
        return
    # Redrawn when something is reported, never by a thread of its own, which would be measured too.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bars:
        bars.add_task("cells", total=total)
        yield _Screen(console, bars)


def _figures(row: dict[str, Any]) -> str:
    """Up to four figures of a row: the method's, with the dense model's beside it."""
    dense = {(m["quantity"], m["task"]): m["median"] for m in row["measurements"] if m["arm"] == "dense"}
    parts = []
    for figure in row["measurements"]:
        if figure["arm"] == "method":
            own = dense.get((figure["quantity"], figure["task"]))
            beside = "" if own is None else f" (dense {own:.4g})"
            parts.append(f"{figure['quantity']} {figure['median']:.4g}{beside}")
    return ", ".join(parts[:4])


def _show_plan(cells: Sequence[Cell], ready: dict[str, str], expected: str, as_json: bool) -> None:
    if as_json:
        body = [
            {**cell.model_dump(mode="json"), "hash": cell.hash, "status": ready.get(cell.hash)}
            for cell in cells
        ]
        print_json({"cells": body, "estimate": expected})
        return
    columns = (
        Column("cell", "dim"),
        Column("method", "bold cyan"),
        Column("parameters"),
        Column("model"),
        Column("task"),
        Column("seed", "", "right"),
        Column("status", "green"),
    )
    rows = [
        (
            cell.hash[:8],
            cell.method,
            " ".join(f"{name}={value}" for name, value in cell.parameters.items()),
            cell.model,
            " ".join([cell.task.name, *(f"{name}={value}" for name, value in cell.task.options.items())]),
            str(cell.seed),
            ready.get(cell.hash, ""),
        )
        for cell in cells
    ]
    print_table(columns, rows)
    rest = f", {len(ready)} of them done (--resume leaves them out)" if ready else ""
    typer.echo(f"{counted(len(cells), 'cell')}{rest}; {expected}", err=True)


def _list_tasks(as_json: bool) -> None:
    from zoo.bench.plan import SIDE_BY_SIDE
    from zoo.bench.tasks import tasks

    rows = [(SIDE_BY_SIDE, "What zoo run measures: speed with its bound, memory and quality.", "")]
    for name, made in tasks().items():
        options = ", ".join(f"{field}={about.default}" for field, about in made.model_fields.items())
        rows.append((name, (made.__doc__ or "").strip().splitlines()[0], options))
    if as_json:
        print_json([dict(zip(("name", "description", "options"), row, strict=True)) for row in rows])
        return
    print_table((Column("task", "bold cyan"), Column("what it asks"), Column("options", "dim")), rows)
