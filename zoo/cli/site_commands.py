"""``zoo site build | serve``: the catalogue as web pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.output import counted

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Build the web pages of the catalogue, or look at them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def build(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the site; one that holds something else is refused.")
    ] = None,
    catalog: Annotated[Path | None, typer.Option(help="Another catalogue than the zoo's own.")] = None,
) -> None:
    """Write the site as plain files, which open from the folder as well as from a server."""
    from taxonomy.site import build as build_site

    done = build_site(catalog, out)
    changed = counted(done.written, "file") + " written" if done.written else "nothing to write"
    gone = f", {done.removed} removed" if done.removed else ""
    typer.echo(
        f"{done.folder}: {changed}{gone}, {done.unchanged} unchanged; open {done.folder / 'index.html'}"
    )


@app.command()
def serve(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 = any free one.")
    ] = 8000,
    folder: Annotated[Path | None, typer.Option("--dir", help="Another folder than the site's own.")] = None,
) -> None:
    """Serve a built site on 127.0.0.1 until interrupted."""
    from taxonomy.site import default_folder
    from taxonomy.site.server import open_server

    with open_server(folder or default_folder(), port) as server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        server.serve_forever()
