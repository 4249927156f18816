"""``zoo pareto | recommend``: what the measurements say about the choice of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from taxonomy import evidence, queries
from taxonomy.evidence import Front, Point, Recommendation, Score
from zoo.cli.output import YES, Column, Json, counted, print_json, print_table, terminal
from zoo.cli.plotting import scatter

MARKS = "123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLOT_HEIGHT = 16

GoalOption = typer.Option("--for", help=f"What to gain: {', '.join(evidence.GOALS)}.")


def pareto(
    family: Annotated[str | None, typer.Option("--family", help="Only methods of this family.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model; default: the one that was measured most.")
    ] = None,
    goal: Annotated[str | None, GoalOption] = None,
    quality: Annotated[
        str | None, typer.Option("--quality", help=f"One of {', '.join(evidence.QUALITIES)}.")
    ] = None,
    hardware: Annotated[str | None, typer.Option("--hardware", help="Part of the hardware's name.")] = None,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Draw so many groups of like runs.")] = 1,
    json: Json = False,
) -> None:
    """Draw the quality kept against the realised gain, and mark the methods nothing else beats in both.

    Where a gain was measured task by task, the table has the tasks, and where nothing was lost, there is no drawing.
    Only runs on the same model, hardware, number format, data and protocol share a plot.
    """
    found = evidence.pareto(
        queries.open_catalog(), family=family, model=model, hardware=hardware, goal=goal, quality=quality
    )
    if json:
        print_json(found)
        return
    if not found:
        asked = " ".join(text for text in (family, f"on {model}" if model else None, hardware) if text)
        typer.echo(
            f"No finished run{f' of {asked}' if asked else ''} shows both a gain and a quality; "
            "`zoo run METHOD` makes one, `zoo results` lists what there is.",
            err=True,
        )
        return
    for front in found[:groups]:
        _print_front(front, terminal())
    if len(found) > groups:
        rest = sum(len(front.points) for front in found[groups:])
        typer.echo(
            f"{counted(rest, 'run')} in {counted(len(found) - groups, 'other group')} "
            "(other hardware, data or format): --groups draws them too.",
            err=True,
        )


def _print_front(front: Front, console: Console) -> None:
    """The plot on a terminal, then the table: best gain first, numbered as in the plot."""
    points = list(reversed(front.points))
    marks = [MARKS[number] if number < len(MARKS) else "·" for number in range(len(points))]
    if console.is_terminal:
        setting = ", ".join(text for text in (front.hardware, front.device, front.dtype) if text)
        console.print(
            Text(front.model, style="bold"),
            Text(f" {setting}; protocol {front.protocol}", style="dim"),
            sep="",
        )
        if not (
            front.by_task and front.unchanged
        ):  # else all would lie at one height, and the tasks say more
            _draw(front, points, marks, console)
    columns, cells = _task_table(front, points) if front.by_task else _plain_table(front, points)
    rows = [(mark, *row) for mark, row in zip(marks, cells, strict=True)]
    if front.by_task:
        foot = (
            f"{front.gain} is over all tasks, each taking the unmodified model equally long; * is faster beyond the "
            f"noise ({front.noise:.1%}); kept is {front.quality}."
        )
    else:
        tasks = "; ".join(text for text in (*front.gain_tasks, *front.quality_tasks) if text)
        foot = f"○ is the unmodified model. Measured on: {tasks}."
    if any(point.gain.suspect for point in points):
        foot += " ! lies above its bound: an error of measurement, credited with the bound."
    print_table([Column("", "bold"), *columns], rows, foot=foot, console=console)


def _draw(front: Front, points: Sequence[Point], marks: Sequence[str], console: Console) -> None:
    placed = [(p.gain.credited, p.quality.value, mark) for p, mark in zip(points, marks, strict=True)]
    lines = scatter(
        [(1.0, 1.0, "○"), *reversed(placed)],
        width=max(20, min(console.width - 12, 100)),
        height=PLOT_HEIGHT,
        across=f"{front.gain}, times better",
        up=f"{front.quality}, share kept",
    )
    for line in lines:
        console.print(Text(line), no_wrap=True, crop=True)


Cells = list[tuple[str, ...]]


def _plain_table(front: Front, points: Sequence[Point]) -> tuple[list[Column], Cells]:
    columns = [
        Column("method", "bold cyan"),
        Column("setting"),
        Column(front.gain, "", "right"),
        Column("bound", "dim", "right"),
        Column(f"{front.quality} kept", "", "right"),
        Column(front.quality, "dim", "right", 110),
        Column("best", "green", "center"),
        Column("run", "dim", "left", 130),
    ]
    return columns, [
        (
            point.trial.method,
            point.trial.setting_text,
            _times(point.gain),
            "" if point.gain.bound is None else f"{point.gain.bound:.2f}×",
            f"{point.quality.value:.1%}",
            "" if point.quality.method is None else f"{point.quality.method:.4g}",
            YES if point.best else "",
            point.trial.key[:8],
        )
        for point in points
    ]


def _task_table(front: Front, points: Sequence[Point]) -> tuple[list[Column], Cells]:
    """The gain on each task."""
    columns = [
        Column("method", "bold cyan"),
        Column("setting", "", "left", 140),
        Column(front.gain, "bold", "right"),
        *(Column(task, "", "right") for task in front.gain_tasks),
        Column("tokens/pass", "dim", "right", 130),
        Column("kept", "", "right"),
        Column("run", "dim", "left", 150),
    ]
    return columns, [
        (
            point.trial.method,
            point.trial.setting_text,
            _times(point.gain),
            *(f"{cell.gain:.2f}×{'*' if cell.sure > 1 else ''}" for cell in point.cells),
            "" if point.passes is None else f"{point.passes:.2f}",
            _kept(point),
            point.trial.key[:8],
        )
        for point in points
    ]


def _kept(point: Point) -> str:
    """The share that is kept, or how many outputs of a proof are the unmodified model's."""
    if point.proven is None:
        return f"{point.quality.value:.1%}"
    return f"{point.proven.method:.0f}/{point.proven.dense:.0f}"


def _times(gain: Score) -> str:
    return f"{gain.value:.2f}×{'!' if gain.suspect else ''}"


def recommend(
    model: Annotated[str, typer.Option("--model", help="The model it is for: short name, hub id or folder.")],
    goal: Annotated[str, GoalOption],
    max_loss: Annotated[
        str, typer.Option("--max-loss", help="Share of the quality that may be lost, as 2%.")
    ] = "2%",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many methods.")] = 5,
    json: Json = False,
) -> None:
    """Say which method to use, why, and with which command: from measurements first, from cards last."""
    answer = evidence.recommend(
        queries.open_catalog(), model, goal, evidence.parse_share(max_loss), most=limit
    )
    print_json(answer) if json else _print_answer(answer, terminal())


def _print_answer(answer: Recommendation, console: Console) -> None:
    console.print(Text(answer.reason))
    if not answer.picks:
        console.print(Text("No card fits either; zoo find lists methods by their properties."))
        return
    for number, pick in enumerate(answer.picks, 1):
        console.print(
            Text(f"\n{number}. "),
            Text(pick.method, style="bold cyan"),
            Text(f"  {_BASES[pick.basis]}", style="dim"),
            sep="",
        )
        console.print(Text(f"   {pick.why}"))
        if pick.hardware:
            console.print(Text(f"   {pick.hardware}; run {(pick.run or '')[:8]}", style="dim"))
        console.print(Text(f"   {pick.command}"), soft_wrap=True)


_BASES = {"measured": "measured", "like": "measured on another model", "card": "not measured"}
