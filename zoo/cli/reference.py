"""``zoo reference``: train the reference models, examine the VLM, and look at what it is shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli.output import Json, terminal

if TYPE_CHECKING:
    from zoo.engines.training import Step
    from zoo.reference.examination import Grade

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def train(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the training.")],
    words: Annotated[int | None, typer.Option("--words", min=1, help="Steps of the first lesson.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the second lesson.")] = None,
    settling: Annotated[int | None, typer.Option("--settling", min=1, help="Steps of the end.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Canvases per step of the second lesson.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of the second lesson.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in DIR.")] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="With --resume: settle with what was learnt so far.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
) -> None:
    """Train projector and adapters of the reference VLM.

    First the projector learns words for what the encoder sees, then projector and adapters learn to answer, at a
    constant rate: stop whenever you like (Ctrl-C), then --resume --finish lets the rate fall and writes
    DIR/reference-vlm.safetensors. Put that file into zoo/reference/weights to make it the one that is loaded.
    """
    from zoo.engines.training import TrainingInterrupted
    from zoo.reference import training

    changes = {"steps": steps, "batch": batch, "learning_rate": lr}
    recipes = training.Recipes(
        words=training.WORDS.model_copy(update=_given({"steps": words})),
        answers=training.ANSWERS.model_copy(update=_given(changes)),
        settling=training.SETTLING.model_copy(update=_given({"steps": settling, "batch": batch})),
    )
    try:
        record = training.train(
            output, recipes=recipes, seed=seed, device=device, resume=resume, finish=finish, on_step=_tell
        )
    except TrainingInterrupted as stopped:
        typer.echo(
            f"interrupted: {stopped.step} steps are kept in {output}; --resume goes on, --resume --finish settles",
            err=True,
        )
        raise typer.Exit(130) from None
    for name, stretch in record.stretches.items():
        typer.echo(
            f"{name}: {stretch.steps} steps, {stretch.canvases} canvases, {stretch.terms} {stretch.unit}, "
            f"loss {stretch.first_loss:.3f} -> {stretch.last_loss:.3f}, {stretch.seconds:.0f} s"
        )


def _given(changes: dict[str, float | int | None]) -> dict[str, float | int]:
    return {name: value for name, value in changes.items() if value is not None}


def _tell(stretch: str, step: Step) -> None:
    """Every tenth step, as a line on standard error."""
    if step.step % 10 == 0 or step.step == step.steps:
        typer.echo(
            f"{stretch} {step.step}/{step.steps}  loss {step.loss:.3f}  {step.speed:.0f} {step.unit}/s",
            err=True,
        )


@app.command("train-probe")
def train_probe(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of head and record.")],
    pictures: Annotated[
        int, typer.Option("--pictures", min=10, help="Training pictures that the head is fitted to.")
    ] = 5000,
    judged: Annotated[
        int, typer.Option("--judged", min=1, help="Test pictures that the classifier is judged on.")
    ] = 1000,
) -> None:
    """Fit the linear head of the reference classifier on CIFAR-10.

    It writes DIR/dinov2-small-cifar10.safetensors and its record. Put both into zoo/reference/weights to make the head
    the one that is loaded.
    """
    from zoo.cli.running import progress_line
    from zoo.reference.classifier import fit

    with progress_line() as show:
        record = fit(output, fitted=pictures, judged=judged, progress=show)
    low, high = record.interval
    typer.echo(
        f"accuracy {record.accuracy:.3f} ({low:.3f} to {high:.3f}) on {record.judged} test pictures; leave-one-out "
        f"{record.left_out:.3f} on the {record.fitted} it was fitted to, ridge strength {record.strength:g}"
    )


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, folder or hub id.")
    ] = "reference-vlm",
    ability: Annotated[
        list[str] | None, typer.Option("--ability", "-a", help="One of the six; repeatable. Default: all.")
    ] = None,
    number: Annotated[int, typer.Option("--questions", "-n", min=2, help="Questions on each ability.")] = 200,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions at once.")] = 16,
    method: Annotated[
        str | None, typer.Option("--method", help="Ask the model with this method (or stack) at work, too.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="A parameter of the method; repeatable."),
    ] = None,
    displaced: Annotated[
        bool, typer.Option(help="Ask again with half of the image tokens moved away from the asked place.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the canvases.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a vision-language model about canvases of held-out pictures, ability by ability.

    With --method, its answers stand beside those of the unmodified model: what is retained, and how many answers are
    the same (loyalty).
    """
    from zoo.cli.running import progress_line
    from zoo.errors import BadInput
    from zoo.interface import method as make_method
    from zoo.models.loading import load_model
    from zoo.reference.examination import examine
    from zoo.reference.questions import ABILITIES
    from zoo.runner import parse_assignments

    wanted = tuple(ability) if ability else ABILITIES
    for name in wanted:
        if name not in ABILITIES:
            raise BadInput(f"there is no ability called '{name}'; there are {', '.join(ABILITIES)}")
    if assignments and method is None:
        raise BadInput("parameters are a method's: name it with --method")
    chosen = None if method is None else make_method(method, **parse_assignments(assignments or []))
    loaded = load_model(model, device=device, dtype=dtype)
    with progress_line() as show:
        grades = examine(
            loaded,
            wanted,
            method=chosen,
            wanted=number,
            seed=seed,
            batch=batch,
            displaced=displaced and chosen is None,
            progress=show,
        )
    if as_json:
        rows = {name: grade.model_dump() for name, grade in grades.items()}
        sys.stdout.write(json.dumps({"model": model, "seed": seed, "abilities": rows}) + "\n")
    else:
        _draw(model, grades)


def _draw(model: str, grades: dict[str, Grade]) -> None:
    from rich.table import Table

    from zoo.bench.retention import retention

    table = Table(title=f"{model}: accuracy on held-out canvases, with 95% bootstrap intervals")
    table.add_column("ability")
    figures = {name: _columns(grade) for name, grade in grades.items()}
    for heading in next(iter(figures.values())):
        table.add_column(heading, justify="right")
    for name, columns in figures.items():
        table.add_row(name, *columns.values())
    terminal().print(table)
    pruned = {name: grade.method for name, grade in grades.items() if grade.method is not None}
    dense = {name: grade.accuracy for name, grade in grades.items()}
    if pruned and any(dense.values()):
        kept = retention(pruned, dense)
        terminal().print(
            f"retained: {kept.mean:.3f} on average, {kept.overall:.3f} as root mean square; least: {kept.lowest} "
            f"({kept.ratios[kept.lowest]:.3f})",
            highlight=False,
        )


def _columns(grade: Grade) -> dict[str, str]:
    """Cells of the table by heading."""
    cells = {
        "accuracy": f"{grade.accuracy:.3f}",
        "interval": f"{grade.low:.3f} to {grade.high:.3f}",
        "chance": f"{grade.chance:.3f}",
    }
    if grade.displaced is not None:
        cells["tokens displaced"] = f"{grade.displaced:.3f}"
    if grade.method is not None:
        cells |= {"with the method": f"{grade.method:.3f}", "loyalty": f"{grade.loyalty:.3f}"}
    return cells | {"questions": str(grade.questions)}


@app.command()
def canvas(
    number: Annotated[int, typer.Argument(min=0, help="Which of the held-out canvases.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="PNG file to write.")],
) -> None:
    """Paint a held-out canvas, and list questions about it with their answers."""
    import numpy as np
    from PIL import Image

    from zoo.errors import RunFailed
    from zoo.reference.canvases import paint
    from zoo.reference.questions import questions

    painted = paint("test", number)
    try:
        Image.fromarray(painted.pixels).save(output, format="PNG")
    except OSError as error:
        raise RunFailed(f"{output} cannot be written: {(error.strerror or str(error)).lower()}") from None
    for question in questions(painted, np.random.default_rng(number)):
        typer.echo(f"{question.ability}: {question.text} {question.answer}")
