"""``zoo export | import``: results and knowledge as files of other programs, and other people's runs."""

from __future__ import annotations

import csv
import io
import json as json_text
import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from taxonomy import queries
from taxonomy.errors import CatalogError, QueryError
from zoo.cli.output import Json, complete_method, counted, print_json


class Format(str, Enum):
    """File formats of ``zoo export``."""

    csv = "csv"
    json = "json"
    parquet = "parquet"
    latex = "latex"
    bibtex = "bibtex"


class What(str, Enum):
    """What ``zoo export`` writes."""

    methods = "methods"
    papers = "papers"
    claims = "claims"
    terms = "terms"
    measurements = "measurements"
    runs = "runs"


_TABLES = {
    What.methods: "v_method",
    What.papers: "v_paper",
    What.claims: "v_claim",
    What.terms: "term",
}

_MEASUREMENT = (
    "run", "origin", "started", "method", "parameters", "model", "hardware", "device", "dtype", "seed", "status",
    "protocol", "config", "task", "quantity", "arm", "median", "spread", "unit", "n",
)  # fmt: skip
"""Columns of an exported measurement."""

Table = tuple[Sequence[str], list[Sequence[Any]]]
"""Names of the columns, and rows."""


def export(
    what: Annotated[What, typer.Argument(help="What to write.")] = What.methods,
    format: Annotated[
        Format | None, typer.Option("--format", "-f", help="Default: by FILE, else csv.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Standard output without it.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="Measurements and runs of this one.", autocompletion=complete_method),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Measurements and runs on this one.")] = None,
    own: Annotated[bool, typer.Option("--own", help="Leave out the reference measurements.")] = False,
    file: Annotated[Path | None, typer.Option("--file", help="Another catalogue than the zoo's own.")] = None,
) -> None:
    """Write methods, papers, claims, terms, measurements or whole runs to a file.

    `measurements` is one line per figure, in LaTeX one line per run; `runs` holds everything that belongs to a run, and
    is what `zoo import` reads. BibTeX of measurements cites the methods that were measured.
    """
    chosen = format or _format_of(output, what)
    if what is What.runs:
        if chosen is not Format.json:
            raise QueryError(f"runs are written as JSON, not {chosen.value}; measurements take every format")
        content = _runs(method, model, own).encode()
    else:
        with closing(queries.open_catalog(file)) as db:
            content = _content(db, what, chosen, method, model, own)
    _write(content, output, chosen)


def _format_of(output: Path | None, what: What) -> Format:
    endings = {"json": Format.json, "parquet": Format.parquet, "tex": Format.latex, "bib": Format.bibtex}
    usual = Format.json if what is What.runs else Format.csv
    return endings.get(output.suffix.lstrip(".").lower(), usual) if output else usual


def _content(
    db: sqlite3.Connection, what: What, chosen: Format, method: str | None, model: str | None, own: bool
) -> bytes:
    """What is asked for, in its format."""
    if chosen is Format.bibtex:
        return _bibtex(db, what, method, model, own).encode()
    if chosen is Format.json and what in (What.methods, What.papers):
        values: Any = (
            queries.find(db, kinds=queries.KINDS) if what is What.methods else queries.papers(db, limit=None)
        )
        return _json(queries.as_json(values)).encode()
    if what is What.measurements:
        names, rows = _pivot(method, model, own) if chosen is Format.latex else _figures(method, model, own)
    else:
        cursor = db.execute(f"SELECT * FROM {_TABLES[what]}")
        names, rows = [column[0] for column in cursor.description], cursor.fetchall()
    if chosen is Format.json:
        return _json([dict(zip(names, row, strict=True)) for row in rows]).encode()
    if chosen is Format.parquet:
        return _parquet(names, rows)
    return (_latex(names, rows) if chosen is Format.latex else _csv(names, rows)).encode()


def _write(content: bytes, output: Path | None, chosen: Format) -> None:
    if output is None:
        if chosen is Format.parquet and sys.stdout.isatty():
            raise QueryError("Parquet is a binary format; name a file with --output")
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        return
    try:
        output.write_bytes(content)
    except OSError as error:
        raise CatalogError(f"{output} cannot be written: {error.strerror or error}") from None


# --- runs and measurements ------------------------------------------------------------------------------------


def _runs(method: str | None, model: str | None, own: bool) -> str:
    from taxonomy.exchange import document, stored_runs

    return document(stored_runs(method=method, model=model, reference=not own))


def _figures(method: str | None, model: str | None, own: bool) -> Table:
    """One row per figure, newest run first."""
    from taxonomy.runs import results

    rows: list[Sequence[Any]] = []
    for run in results(method, model=model, limit=None, reference=not own):
        asked = json_text.dumps(run.parameters, sort_keys=True)
        about = (
            run.key, run.origin, run.started, run.method, asked, run.model, run.hardware, run.device, run.dtype,
            run.seed, run.status, run.protocol, run.config,
        )  # fmt: skip
        rows += [
            (*about, m.task, m.quantity, m.arm, m.median, m.spread, m.unit, m.n) for m in run.measurements
        ]
    return _MEASUREMENT, rows


def _pivot(method: str | None, model: str | None, own: bool) -> Table:
    """One row per method and setting with its gains and the quality it keeps, for a table in a paper."""
    from taxonomy.evidence import ALL_GAINS, QUALITIES, trials

    found = trials(model=model, methods=[method] if method else None)
    if own:
        found = [trial for trial in found if trial.origin == "own"]
    names = [name for name in (*ALL_GAINS, *QUALITIES) if any(name in trial.scores for trial in found)]
    rows: list[Sequence[Any]] = [
        (
            trial.method,
            trial.setting_text,
            trial.model,
            *(f"{trial.scores[name].value:.3f}" if name in trial.scores else "" for name in names),
        )
        for trial in sorted(found, key=lambda trial: (trial.model, trial.method, trial.setting_text))
    ]
    return ["method", "setting", "model", *names], rows


# --- formats --------------------------------------------------------------------------------------------------


def _json(values: Any) -> str:
    return json_text.dumps(values, ensure_ascii=False, indent=1) + "\n"


def _csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


def _parquet(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise QueryError(
            "Parquet needs pyarrow; install it with: pip install 'efficiency-zoo[parquet]'"
        ) from None
    columns = zip(*rows, strict=True) if rows else ([] for _ in names)
    sink = io.BytesIO()
    parquet.write_table(
        arrow.table({name: list(column) for name, column in zip(names, columns, strict=True)}), sink
    )
    return sink.getvalue()


_TEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _latex(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of the booktabs package."""

    def line(cells: Iterable[Any]) -> str:
        texts = ("" if cell is None else " ".join(str(cell).split()) for cell in cells)
        return " & ".join("".join(_TEX.get(letter, letter) for letter in text) for text in texts) + r" \\"

    body = [r"\begin{tabular}{" + "l" * len(names) + "}", r"\toprule", line(names), r"\midrule"]
    return "\n".join([*body, *map(line, rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def _bibtex(db: sqlite3.Connection, what: What, method: str | None, model: str | None, own: bool) -> str:
    if what is What.papers:
        return "\n\n".join(queries.paper_bibtex(paper) for paper in queries.papers(db, limit=None)) + "\n"
    if what not in (What.methods, What.measurements):
        raise QueryError(f"{what.value} cannot be written as BibTeX; methods, measurements and papers can")
    entries = dict(db.execute("SELECT slug, bibtex FROM method ORDER BY slug"))
    if what is What.measurements:
        _, rows = _figures(method, model, own)
        measured = {slug for row in rows for slug in row[_MEASUREMENT.index("method")].split("+")}
        entries = {slug: text for slug, text in entries.items() if slug in measured}
    return "\n\n".join(entries.values()) + "\n"


# --- import ---------------------------------------------------------------------------------------------------


def import_(
    file: Annotated[Path, typer.Argument(help="What `zoo export runs` wrote, or a file of measurements.")],
    json: Json = False,
) -> None:
    """Add the runs of somebody else's export to yours: checked, with their environment and the file they came from.

    A run has the same key everywhere, so importing twice, or what you have already, changes nothing.
    """
    from taxonomy.exchange import import_runs

    done = import_runs(file)
    if json:
        print_json(done)
        return
    known = f", {counted(done.known, 'run')} known already" if done.known else ""
    typer.echo(f"{file}: {counted(done.added, 'run')} imported{known}; zoo results shows them")
