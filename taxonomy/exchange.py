"""Passing runs on: complete runs as a file, and the runs of somebody else's file into the user's catalogue.

An exported file is one JSON document, ``{"format": "efficiency-zoo-runs", "version": 1, "runs": [...]}``; each run
is what a line of ``taxonomy/measurements/*.jsonl`` is, and such files can be imported too. A run keeps its key
wherever it goes, so nothing is counted twice, and keeps the environment it was measured in; the file it came from is
added to that under ``imported``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from taxonomy import paths, schema
from taxonomy.errors import CatalogError, EmptyCatalogError
from taxonomy.runs import IMPORTED, Measurement, Run, canonical_json, insert_run, open_runs, reading

FORMAT, VERSION = "efficiency-zoo-runs", 1


@dataclass(frozen=True)
class Imported:
    """What an import did: runs that were new, and runs that were there already."""

    file: str
    added: int
    known: int


def stored_runs(
    *, method: str | None = None, model: str | None = None, reference: bool = True, where: str | None = None
) -> list[Run]:
    """Complete runs, oldest first: the user's and, unless ``reference`` is off, those that come with the zoo.

    Args:
        method: a slug (stacks that hold it are found too).
        model: reference of the model.
        reference: also the reference measurements.
        where: file or URL of the user's catalogue; ``None`` = the usual one.

    Raises:
        CatalogError: a catalogue cannot be read.
    """
    found: dict[str, Run] = {}
    for place in [where or paths.user_catalog(), *([str(paths.catalog_file())] if reference else [])]:
        if "://" in place or Path(place).is_file():
            with suppress(EmptyCatalogError), reading(place) as connection:
                found |= {run.key: run for run in _runs(connection, method, model)}
    return sorted(found.values(), key=lambda run: (run.started, run.key))


def _runs(
    connection: sa.Connection, method: str | None, model: str | None, keys: Iterable[str] = ()
) -> list[Run]:
    run, kind, environment = schema.run, schema.model, schema.environment
    query = (
        sa.select(run, kind.c.ref, kind.c.revision, kind.c.facts.label("model_facts"), environment.c.facts)
        .join(kind, kind.c.id == run.c.model)
        .join(environment, environment.c.id == run.c.environment)
    )
    if method:
        holding = sa.select(schema.run_method.c.run).where(schema.run_method.c.slug == method)
        query = query.where(run.c.id.in_(holding))
    if model:
        query = query.where(kind.c.ref == model)
    if keys:
        query = query.where(run.c.key.in_(list(keys)))
    rows = list(connection.execute(query).mappings())
    chosen = query.with_only_columns(run.c.id).subquery()
    figures: dict[int, list[Measurement]] = {row["id"]: [] for row in rows}
    measured = sa.select(schema.measurement).join(chosen, chosen.c.id == schema.measurement.c.run)
    for row in connection.execute(measured).mappings():
        figures[row["run"]].append(Measurement(**{part.name: row[part.name] for part in fields(Measurement)}))
    plain = (
        "key", "method", "started", "seconds", "parameters", "inputs", "seed", "dtype", "device", "status", "error",
        "protocol", "report",
    )  # fmt: skip
    return [
        Run(
            model=row["ref"],
            model_revision=row["revision"],
            model_facts=row["model_facts"],
            environment=row["facts"],
            measurements=tuple(figures[row["id"]]),
            **{name: row[name] for name in plain},
        )
        for row in rows
    ]


def document(runs: Iterable[Run]) -> str:
    """The text of an export."""
    body = {"format": FORMAT, "version": VERSION, "runs": [run.to_json() for run in runs]}
    return json.dumps(body, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def read_runs(file: Path) -> list[Run]:
    """Runs of an export, or of a file with one run per line; each is marked with the file it comes from.

    Raises:
        CatalogError: the file cannot be read, is of another kind or a newer version, or holds a run that is wrong.
    """
    try:
        content = file.read_bytes()
        text = content.decode()
    except OSError as error:
        raise CatalogError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CatalogError(f"{file} is not a text file; import what `zoo export runs` wrote") from None
    source = f"{file.name}, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    return [_marked(Run.from_json(row, where), where, source) for where, row in _entries(text, file.name)]


def _entries(text: str, name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """``(place, run)`` for every run in ``text``."""
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if isinstance(body, dict) and "runs" in body:
        if body.get("format") != FORMAT or not isinstance(body["runs"], list):
            raise CatalogError(f"{name} is not an export of runs; write one with: zoo export runs -o FILE")
        if body.get("version") != VERSION:
            raise CatalogError(
                f"{name} has version {body.get('version')}; this zoo reads {VERSION}: upgrade it"
            )
        rows = [(f"{name} run {number}", row) for number, row in enumerate(body["runs"], 1)]
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [(f"{name} line {number}", json.loads(line))] if line.strip() else []
            except ValueError:
                raise CatalogError(
                    f"{name} line {number} is not JSON; import what `zoo export runs` wrote"
                ) from None
    if not rows:
        raise CatalogError(f"{name} holds no run")
    for where, row in rows:
        if not isinstance(row, dict):
            raise CatalogError(f"{where} is not a run: a JSON object is expected")
    return rows


def _marked(run: Run, where: str, source: str) -> Run:
    """``run`` with the file it came from; one that was imported before keeps its first source."""
    shown = (run.key, run.method, run.model, run.environment["hardware"], run.error or "")
    if not all("".join(text.split()).isprintable() for text in shown if isinstance(text, str)):
        raise CatalogError(f"{where} has control characters in a name; they are refused")
    return replace(run, environment={IMPORTED: source, **run.environment})


def import_runs(file: Path, where: str | None = None) -> Imported:
    """Add the runs of ``file`` to the user's catalogue: all of them or, when something is wrong, none.

    Raises:
        CatalogError: ``file`` is not acceptable, or has another run under a key that is taken.
    """
    runs = read_runs(file)
    known = {run.key: run for run in stored_runs(where=where)}
    new: dict[str, Run] = {}
    for run in runs:
        taken = known.get(run.key) or new.get(run.key)
        if taken is None:
            new[run.key] = run
        elif _measured(taken) != _measured(run):
            raise CatalogError(
                f"{file.name}: run {run.key[:8]} is stored with other content, so one of the two was edited; "
                "nothing was imported"
            )
    with open_runs(where) as store, store.writing() as connection:
        for run in new.values():
            insert_run(connection, run)
    return Imported(str(file), len(new), len(runs) - len(new))


def _measured(run: Run) -> str:
    """What identifies the content of a run, whatever way it came: the order of its figures does not matter."""
    figures = sorted(canonical_json(asdict(figure)) for figure in run.measurements)
    facts = {name: value for name, value in run.environment.items() if name != IMPORTED}
    return canonical_json([run.method, run.config, run.started, run.status, facts, figures])
