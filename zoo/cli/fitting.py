"""``zoo fit``: parameters that a method finds on samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.output import complete_method


def fit(
    method: Annotated[str, typer.Argument(help="Method to fit.", autocompletion=complete_method)],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Short name (zoo models), folder or hub id. Default: by family."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images", "-i", help="Folder of pictures, or a picture; repeatable. Default: packaged ones."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Question about each of them.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put it into the chat template.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use no more pictures than this.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="What the search is told; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the parameters here, not to standard output."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
) -> None:
    """Find the parameters of a method on samples, as JSON that zoo run METHOD --params FILE takes.

    Ctrl-C ends it without a result.
    """
    from zoo.cli.running import progress_line
    from zoo.fitting import Samples, check_parameter_target, write_parameters
    from zoo.fitting import fit as fit_method
    from zoo.runner import parse_assignments
    from zoo.scenes import QUESTION

    options = parse_assignments(assignments or [])
    if output is not None:
        check_parameter_target(output)
    samples = Samples(tuple(images or ()), prompt or QUESTION, raw, limit)
    with progress_line() as progress:
        fitted = fit_method(
            method, model, samples, options, device=device, dtype=dtype, seed=seed, progress=progress
        )
    if output is None:
        sys.stdout.write(fitted.to_json() + "\n")
        return
    write_parameters(fitted, output)
    typer.echo(f"{output}: {', '.join(f'{name}={value}' for name, value in fitted.parameters.items())}")
    on = f" --model {fitted.fitted_on.model}" if fitted.fitted_on else ""
    typer.echo(f"try it: zoo run {method}{on} --params {output}")
