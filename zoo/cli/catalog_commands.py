"""``zoo catalog build | publish | check | sql | path | export``: the catalogue as a file."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from taxonomy import files, paths, queries
from taxonomy.errors import QueryError
from zoo.cli.exchange_commands import export
from zoo.cli.output import Column, Json, counted, print_json, print_table

if TYPE_CHECKING:
    from taxonomy.catalog import Sources

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Build, check, query or export the catalogue.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Annotated[Path | None, typer.Option("--file", help="Another file than the zoo's own.")]


def sources() -> Sources:
    """The text sources, with the parameters of every implementation (which imports them, and torch)."""
    from taxonomy.catalog import Sources, parameters_of
    from zoo.interface import implemented, method_class

    slugs = [slug for slug in implemented() if (paths.CARDS / f"{slug}.toml").is_file()]
    return Sources.load(slugs, {slug: parameters_of(method_class(slug)) for slug in slugs})


@app.command()
def build(file: Target = None) -> None:
    """Build catalog.sqlite from cards, bibliography, measurements and implementations."""
    from taxonomy.catalog import build

    target = file or paths.catalog_file()
    material = sources()
    written = build(material, target)
    size = target.stat().st_size / 2**20
    state = "written" if written else "unchanged"
    typer.echo(
        f"{target}: {state}; {counted(len(material.cards), 'card')}, {len(material.implemented)} of them run, "
        f"{counted(len(material.papers), 'paper')}, {counted(len(material.runs), 'reference run')}, {size:.1f} MiB"
    )


@app.command()
def publish(
    place: Annotated[
        str | None,
        typer.Argument(help="File or SQLAlchemy URL; your own catalogue (ZOO_CATALOG) without it."),
    ] = None,
) -> None:
    """Put cards, vocabulary and bibliography beside the runs of your catalogue, so that SQL can join them.

    For the PostgreSQL database of a team; runs that are there stay as they are.
    """
    from taxonomy.catalog import publish
    from taxonomy.runs import shown

    material = sources()
    where = place or paths.user_catalog()
    state = "written" if publish(material, where) else "unchanged"
    typer.echo(
        f"{shown(where)}: {state}; {counted(len(material.cards), 'card')}, {counted(len(material.papers), 'paper')}"
    )


@app.command()
def check(file: Target = None) -> None:
    """Compare catalog.sqlite with what its sources say; exit with 1 when it differs."""
    from taxonomy.catalog import check

    target = file or paths.catalog_file()
    difference = check(sources(), target)
    if difference:
        typer.echo(difference, err=True)
        raise typer.Exit(1)
    typer.echo(f"{target}: up to date")


@app.command()
def path(
    runs: Annotated[bool, typer.Option("--runs", help="The file (or URL) of your own runs instead.")] = False,
    json: Json = False,
) -> None:
    """Print where the catalogue is."""
    if json:
        print_json({"catalog": str(paths.catalog_file()), "runs": _own_place()})
    else:
        typer.echo(_own_place() if runs else str(paths.catalog_file()))


def _own_place() -> str:
    """The user's catalogue, without a password."""
    place = paths.user_catalog()
    if "://" in place:
        from taxonomy.runs import shown

        return shown(place)
    return place


_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_PRAGMAS = {
    "data_version",
    "table_info",
    "table_xinfo",
    "table_list",
    "index_list",
    "index_info",
    "foreign_key_list",
}


def _only_reading(
    action: int, first: str | None, second: str | None, database: str | None, trigger: str | None
) -> int:
    """SQLite asks before it compiles each part of a statement."""
    if action in _READING or (action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SELECT; - reads it from standard input.")],
    file: Target = None,
    runs: Annotated[
        bool, typer.Option("--runs", help="Ask the catalogue of your own runs alone, PostgreSQL included.")
    ] = False,
    json: Json = False,
) -> None:
    """Ask the catalogue in SQL, for reading only. Views: v_method, v_paper, v_claim, v_run, v_measurement.

    Your own runs, when they are in a file, are attached as `own`: SELECT * FROM own.v_measurement.
    """
    text = sys.stdin.read() if query == "-" else query
    names, rows = _own_answer(text) if runs else _answer(text, file)
    if json:
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    columns = [Column(name) for name in names]
    print_table(columns, [["" if value is None else str(value) for value in row] for row in rows])


def _own_answer(text: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    from taxonomy.runs import ask

    return ask(text)


def _answer(text: str, file: Path | None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """What the built catalogue says; the file with the user's runs, if there is one, is attached as ``own``."""
    db = queries.open_catalog(file)
    own = paths.user_catalog()
    attached = "://" not in own and Path(own).is_file()
    if attached:
        files.connect(Path(own)).close()  # is it ours, and readable?
        db.execute("ATTACH ? AS own", (f"{Path(own).as_uri()}?mode=ro",))
    for schema in ("main", "own") if attached else ("main",):
        for name in (
            "method_fts",
            "paper_fts",
        ):  # they set themselves up at first use, which the guard forbids
            db.execute(f"SELECT 1 FROM {schema}.{name} LIMIT 0")
    db.set_authorizer(_only_reading)
    try:
        cursor = db.execute(text)
        return [column[0] for column in cursor.description or ()], cursor.fetchall()
    except (sqlite3.Error, sqlite3.Warning) as error:
        only = " (the catalogue is open for reading only)" if "authorized" in str(error) else ""
        raise QueryError(f"SQL: {error}{only}") from None


app.command("export")(export)
