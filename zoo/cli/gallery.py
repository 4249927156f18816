"""``zoo gallery``: one photo, every visual-token method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.output import complete_method, counted


def gallery(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            help="Visual-token methods. Default: all that suit the model.", autocompletion=complete_method
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Short name (zoo models), folder or hub id of a VLM."),
    ] = None,
    image: Annotated[str, typer.Option("--image", help="Picture file, or china, flower, coffee.")] = "china",
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="keep_ratio of methods that have one. Default: their own."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the page.")] = Path("gallery"),
) -> None:
    """Draw which visual tokens of a photo each method keeps: a PNG per method, and a page with all of them."""
    from zoo.cli.running import progress_line
    from zoo.gallery import build_gallery

    with progress_line() as progress:
        done = build_gallery(out, methods or (), model, image, keep, progress)
    for slug, reason in done.left_out:
        typer.echo(f"not drawn: {slug}: {' '.join(reason.split())}", err=True)
    typer.echo(f"{done.page}: {counted(len(done.drawn), 'method')}")
