"""``zoo results``: what was measured, by the user and by the zoo itself."""

from __future__ import annotations

from typing import Annotated

import typer

from taxonomy.runs import Measurement, Result
from taxonomy.runs import results as stored_results
from zoo.cli.output import Column, Json, complete_method, counted, print_json, print_table


def results(
    method: Annotated[
        str | None, typer.Argument(help="Only this method (or stack a+b).", autocompletion=complete_method)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only this model.")] = None,
    quantity: Annotated[str | None, typer.Option("--quantity", help="Only this quantity.")] = None,
    status: Annotated[
        str | None, typer.Option("--status", help="done, failed, refused or interrupted.")
    ] = None,
    own: Annotated[bool, typer.Option("--own", help="Leave out the reference measurements.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many runs.")] = 20,
    json: Json = False,
) -> None:
    """List runs, newest first: yours and the reference measurements that come with the zoo."""
    found = stored_results(
        method, model=model, quantity=quantity, status=status, limit=limit, reference=not own
    )
    if json:
        print_json(found)
        return
    columns = (
        Column("started", "dim"),
        Column("method", "bold cyan"),
        Column("model"),
        Column("status"),
        Column("figures"),
        Column("hardware", "dim", "left", 130),
        Column("origin", "dim", "left", 130),
        Column("run", "dim", "left", 130),
    )
    rows = [
        (
            run.started[:16].replace("T", " "),
            run.method,
            run.model,
            run.status,
            run.error or _figures(run),
            run.hardware,
            run.origin,
            run.key[:8],
        )
        for run in found
    ]
    more = " (--limit shows more)" if len(found) == limit else ""
    print_table(columns, rows, foot=f"{counted(len(found), 'run')}{more}")


def _figures(run: Result) -> str:
    """Each quantity once: the ratio where there is one, else the method's figure, else the dense model's."""
    best: dict[tuple[str, str], Measurement] = {}
    rank = {"ratio": 0, "method": 1, "dense": 2}
    for figure in sorted(run.measurements, key=lambda figure: rank[figure.arm]):
        best.setdefault((figure.task, figure.quantity), figure)
    texts = []
    for (task, quantity), figure in sorted(best.items()):
        value = f"{figure.median:.3g}" + (
            "×" if figure.arm == "ratio" else f" {figure.unit}" if figure.unit != "1" else ""
        )
        dense = " (dense)" if figure.arm == "dense" else ""
        texts.append(f"{f'{task} ' if task else ''}{quantity} {value}{dense}")
    return ", ".join(texts)
