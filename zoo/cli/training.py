"""``zoo train``: a thin shell around ``zoo.train``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.output import Json, complete_method, terminal

if TYPE_CHECKING:
    from zoo.engines.training import Step
    from zoo.training import Trained


def train(
    method: Annotated[str, typer.Argument(help="Method to train.", autocompletion=complete_method)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="New folder: the result will be in DIR/model."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Short name (zoo models), folder or hub id. Default: by family."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="What to learn from: a file, a folder or a packaged name. Text: .jsonl with prompt and response "
            "(or instruction and output), or plain text as for --calibration. Pictures: cifar10, mnist, fashion-mnist, "
            "or a folder with a sub-folder for each class (dtop: images/, masks/, classes.txt). Default: the "
            "method's own.",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="A parameter of the method; repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Examples per forward pass.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            metavar="NAME=VALUE",
            help="Anything else of the recipe: epochs, accumulate, warmup, schedule, weight_decay, clip, "
            "precision, checkpoint_every ...; repeatable.",
        ),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per example of text.")] = 256,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Text for methods that prune first.")
    ] = None,
    calibration_windows: Annotated[
        int, typer.Option("--calibration-windows", min=1, help="Windows of 128 tokens drawn from it.")
    ] = 32,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished training in DIR.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
) -> None:
    """Train what a method has to train, and save the result.

    Weight methods prune the model first and then recover it: zoo train cfsp --model M --output DIR. A folder that
    zoo run cfsp --save wrote is recovered as it is. Ctrl-C keeps the finished steps; --resume goes on from there and
    ends with the same bits. DIR/training.jsonl has a line per step.
    """
    from zoo.data import load_texts
    from zoo.engines.training import TrainingInterrupted
    from zoo.runner import parse_assignments
    from zoo.training import train as train_method

    recipe = {**parse_assignments(more or []), "steps": steps, "learning_rate": lr, "batch": batch}
    with _progress() as (show, step):
        try:
            trained = train_method(
                method,
                model,
                data,
                output=output,
                parameters=parse_assignments(assignments or []),
                recipe={name: value for name, value in recipe.items() if value is not None},
                length=length,
                calibration=None if calibration is None else load_texts(calibration),
                calibration_windows=calibration_windows,
                seed=seed,
                device=device,
                dtype=dtype,
                resume=resume,
                progress=show,
                on_step=step,
            )
        except TrainingInterrupted as stopped:
            typer.echo(
                f"interrupted: {stopped.step} of {stopped.steps} steps are kept in {output}; the same command with "
                "--resume goes on",
                err=True,
            )
            raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(trained.record.model_dump_json() + "\n")
    else:
        _draw(trained)


@contextmanager
def _progress() -> Iterator[tuple[Any, Any]]:
    """What is going on, on standard error: a line that is redrawn, or plain lines where that is not a terminal."""
    from zoo.cli.running import progress_line

    def tell(step: Step) -> str:
        return f"step {step.step}/{step.steps}  loss {step.loss:.3f}  {step.speed:.0f} {step.unit}/s"

    if not sys.stderr.isatty():

        def line(step: Step) -> None:
            if step.step % max(1, step.steps // 10) == 0 or step.step == step.steps:
                typer.echo(tell(step), err=True)

        yield (lambda *_: None), line
        return
    with progress_line() as show:
        yield show, lambda step: show(tell(step), step.step, step.steps)


def _draw(trained: Trained) -> None:
    """The record as a small table."""
    from rich.table import Table

    record = trained.record
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    rows = {
        "method": record.method,
        "model": record.model,
        "data": f"{record.data}: {record.examples} examples, {record.heldout} held out",
        "steps": f"{record.steps} in {record.seconds:.0f} s, {record.terms} {record.unit}",
        "loss": f"{record.first_loss:.3f} -> {record.last_loss:.3f}",
    }
    for name, figure in record.after.items():
        rows[name] = f"{record.before[name]:.4g} -> {figure:.4g}"
    rows["saved"] = str(trained.folder)
    for name, value in rows.items():
        table.add_row(name, value)
    terminal().print(table)
