"""``zoo run``, ``zoo models``, ``zoo new``, ``zoo doctor``: thin shells around the Python API."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.output import Json, complete_method
from zoo.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from zoo.live import LiveText


class Family(str, Enum):
    """Families that ``zoo new`` can begin a method of."""

    weights = "weights"
    decoding = "decoding"
    visual_tokens = "visual-tokens"
    encoder_tokens = "encoder-tokens"


def run(
    method: Annotated[
        str, typer.Argument(help="Method, or a stack of them: a+b.", autocompletion=complete_method)
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Short name (zoo models), folder or hub id. Default: by family."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="A parameter of the method; repeatable."),
    ] = None,
    params: Annotated[
        list[Path] | None,
        typer.Option("--params", metavar="FILE", help="Parameters that zoo fit found; --set overrides them."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue or answer.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="The same, from a file.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put the prompt into the chat template.")] = False,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="Picture file, or china, flower, coffee; repeatable."),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            "--video", help="Folder of frames, animated GIF or video file, for vision-language models."
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Frames taken of the video, at equal distances.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text for pruning: .txt, .jsonl, .json, .parquet, or hub:OWNER/NAME[@CONFIG][:SPLIT[:COLUMN]].",
        ),
    ] = None,
    calibration_windows: Annotated[
        int, typer.Option("--calibration-windows", min=1, help="Windows of 128 tokens drawn from it.")
    ] = 32,
    draft: Annotated[
        str | None, typer.Option("--draft", help="Draft model, for methods that use one.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option("--heads", metavar="DIR", help="Heads that zoo train made, for methods that use some."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, help="Timed rounds per quantity.")] = 5,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=0, help="Begin no further round of a quantity after this (three are made)."
        ),
    ] = 20.0,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="DIR", help="Write the pruned model here.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Write report.html and record.json here.")
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(
            "--overlay", metavar="FILE", help="Draw the tokens that stay (PNG). --report does it too."
        ),
    ] = None,
    draw_tree: Annotated[
        bool, typer.Option("--draw-tree", help="Draw the draft of the step that accepted most tokens.")
    ] = False,
    as_json: Json = False,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Do not store the run in your catalogue.")
    ] = False,
) -> None:
    """Run a method on a model, measured side by side with the unmodified model."""
    from rich.console import Console

    from zoo.bench.record import RunRecord
    from zoo.bench.settings import Settings
    from zoo.fitting import read_parameters
    from zoo.runner import Request, RunInterrupted, parse_assignments
    from zoo.runner import run as run_method

    given: dict[str, Any] = {}
    for file in params or ():
        given |= read_parameters(file, method)
    if heads is not None:
        given["heads"] = heads
    request = Request(
        parameters=given | parse_assignments(assignments or []),
        prompt=_prompt(prompt, prompt_file),
        raw=raw,
        images=tuple(image or ()),
        video=video,
        frames=frames,
        calibration=calibration,
        calibration_windows=calibration_windows,
        draft=draft,
        device=device,
        dtype=dtype,
        seed=seed,
        save=save,
        report=report,
        overlay=overlay,
        store=not no_record,
    )
    settings = Settings(repeats=repeats, seconds=seconds, new_tokens=max_new_tokens)
    console = Console(highlight=False)
    record: RunRecord
    interrupted = False
    with progress_line() as progress:
        live = _live_text(method, console, progress, console.is_terminal and not as_json, draw_tree)
        watch = None if live is None else live.follow
        try:
            record = run_method(method, model, request, settings=settings, progress=progress, watch=watch)
        except RunInterrupted as interrupt:
            record, interrupted = interrupt.record, True
    if as_json:
        sys.stdout.write(record.to_json() + "\n")
    else:
        from zoo.panels import draw

        draw(record, console)
        if live is not None and draw_tree:
            console.print(live.tree())
    if report is not None:
        typer.echo(f"report: {report / 'report.html'}", err=True)
    if "overlay" in record.inputs:
        typer.echo(f"overlay: {record.inputs['overlay']}", err=True)
    if interrupted:
        typer.echo(
            "interrupted: the figures above were finished" + ("" if no_record else " and are stored"),
            err=True,
        )
        raise typer.Exit(130)


def _live_text(
    method: str, console: Console, progress: ProgressLine, stream: bool, draw_tree: bool
) -> LiveText | None:
    """What follows a generation on the terminal, when the method decodes and somebody looks."""
    from zoo.interface import method_class
    from zoo.live import LiveText

    if not stream and not draw_tree:
        return None
    if all(method_class(slug.strip()).phase != "decoding" for slug in method.split("+")):
        if draw_tree:
            raise BadInput(f"{method} drafts nothing, so there is no tree to draw")
        return None
    return LiveText(console, stream=stream, pause=progress.pause)


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    if file is None:
        return prompt
    if prompt is not None:
        raise BadInput("give either --prompt or --prompt-file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"the prompt file {file} is not UTF-8 text") from None
    except OSError as error:
        raise BadInput(
            f"the prompt file {file} cannot be read: {(error.strerror or str(error)).lower()}"
        ) from None


class ProgressLine:
    """A line that says what is going on, on a terminal or nowhere.

    It is redrawn when something is reported and never by a thread of its own, which would be measured too.
    """

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._line = None if bar is None else bar.add_task("", total=None)
        self._latest = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say what is being done, how much of it is done, and of how much (0: unknown)."""
        if self._bar is None or self._line is None:
            return
        if what != self._latest:
            self._latest = what
            self._bar.reset(self._line)
        self._bar.update(self._line, description=what, completed=done, total=total or None)
        self._bar.refresh()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the terminal to others meanwhile."""
        if self._bar is None:
            yield
            return
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()


@contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """A line on standard error for the duration of some work; silent when that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLine(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        yield ProgressLine(bar)


def models(as_json: Json = False) -> None:
    """List the models that have a short name. Any folder or hub id works too."""
    from zoo.cli.output import Column, print_json, print_table
    from zoo.models.names import known_models

    known = known_models()
    if as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "description": model.description,
                    "kind": model.kind,
                    "licence": model.licence or None,
                    "megabytes": model.megabytes,
                    "hub": model.hub,
                    "package": " + ".join(file.label for file in model.packages) or None,
                    "random": model.random,
                    "cached": model.cached,
                    "caveat": model.caveat or None,
                }
                for model in known
            ]
        )
        return
    columns = (
        Column("name", "bold cyan"),
        Column("what it is"),
        Column("kind", "dim"),
        Column("licence", "dim", "left", 100),
        Column("size", "", "right"),
        Column("here", "green"),
    )
    rows = [
        (
            model.name,
            model.description,
            model.kind,
            model.licence,
            f"{model.megabytes:.0f} MB" if model.megabytes else "",
            "yes" if model.cached else "",
        )
        for model in known
    ]
    print_table(columns, rows, foot="here: loads without a network. The others are fetched on first use.")


def new(
    name: Annotated[str, typer.Argument(help="The method's slug, as in my-method.")],
    family: Annotated[Family, typer.Option("--family", "-f", help="What kind of method it is.")],
    into: Annotated[
        Path | None,
        typer.Option("--into", metavar="DIR", help="Checkout to write to. Default: the one that runs."),
    ] = None,
) -> None:
    """Begin a method: a card, a module that works already, and a test."""
    from zoo.cli.scaffold import scaffold

    written = scaffold(name, family.value, into)
    for path in written.paths:
        typer.echo(f"wrote {path}")
    typer.echo(written.next_steps)


def doctor(as_json: Json = False) -> None:
    """Check this installation: versions, devices, caches, catalogue."""
    from zoo.cli.output import terminal
    from zoo.doctor import examine

    findings = examine()
    if as_json:
        sys.stdout.write(json.dumps([vars(finding) for finding in findings], indent=2) + "\n")
    else:
        _show_findings(findings, terminal())
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


def _show_findings(findings: list[Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    signs = {"fine": ("ok", "green"), "missing": ("--", "yellow"), "wrong": ("!!", "bold red")}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        sign, style = signs[finding.state]
        table.add_row(Text(sign, style=style), Text(finding.what, style="bold"), Text(finding.said))
    console.print(table)
