"""Reading stored runs: the newest that meet some conditions, or whatever a ``SELECT`` asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from taxonomy import paths, schema
from taxonomy.errors import CatalogError, EmptyCatalogError
from taxonomy.runs.database import reading
from taxonomy.runs.run import IMPORTED, Measurement


@dataclass(frozen=True)
class Result:
    """A stored run as ``results`` returns it.

    ``origin`` is ``own``, ``imported`` (from somebody's export) or ``reference`` (shipped with the zoo).
    """

    key: str
    origin: str
    method: str
    model: str
    hardware: str
    device: str | None
    dtype: str | None
    seed: int | None
    status: str
    started: str
    seconds: float
    error: str | None
    parameters: dict[str, Any]
    config: str
    protocol: str
    environment: dict[str, Any]
    measurements: tuple[Measurement, ...]


def results(
    method: str | None = None,
    *,
    model: str | None = None,
    quantity: str | None = None,
    status: str | None = None,
    limit: int | None = 20,
    where: str | None = None,
    reference: bool = True,
) -> list[Result]:
    """Stored runs, newest first: the user's own and the reference measurements.

    Args:
        method: a slug (stacks that hold it are found too), or a whole stack ``a+b``.
        model: reference of the model.
        quantity: only runs that measured it, and of these only its measurements.
        limit: at most so many; ``None`` = all.
        where: file or URL of the user's catalogue; ``None`` = the usual one. It need not exist yet.
        reference: also look into the catalogue that the zoo ships.

    Raises:
        CatalogError: a catalogue cannot be read.
    """
    found: list[Result] = []
    place = where or paths.user_catalog()
    sources = [(place, "own")]
    if reference:
        sources.append((str(paths.catalog_file()), "reference"))
    for source, origin in sources:
        if "://" not in source and not Path(source).is_file():
            continue
        # An empty file is one that another process is just creating: nothing is in it yet.
        with suppress(EmptyCatalogError), reading(source) as connection:
            found += _select(connection, origin, method, model, quantity, status, limit)
    once = {result.key: result for result in found}  # a run that was imported may also be a reference run
    return sorted(once.values(), key=lambda result: (result.started, result.key), reverse=True)[:limit]


def ask(query: str, where: str | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Ask the user's catalogue one ``SELECT``, in a transaction that cannot write.

    Args:
        query: SQL of the database that it is kept in.
        where: file or SQLAlchemy URL; ``None`` = the user's own catalogue.

    Returns:
        Names of the columns, and rows of JSON values.

    Raises:
        CatalogError: the catalogue cannot be read, or the database refuses the query.
    """
    # A colon would mark a parameter otherwise.
    statement = sa.text(query.replace(":", r"\:"))
    with reading(where or paths.user_catalog()) as connection:
        answer = connection.execute(statement)
        if not answer.returns_rows:
            raise CatalogError("the query returns no rows; ask a SELECT")
        return list(answer.keys()), [tuple(_plain(value) for value in row) for row in answer]


def _plain(value: Any) -> Any:
    """What JSON can hold: PostgreSQL also answers with exact decimals, dates and others."""
    if isinstance(value, Decimal):
        return float(value)
    return value if value is None or isinstance(value, int | float | str | list | dict) else str(value)


def _select(
    connection: Connection,
    origin: str,
    method: str | None,
    model: str | None,
    quantity: str | None,
    status: str | None,
    limit: int | None,
) -> list[Result]:
    found = _newest(connection, method, model, quantity, status, limit)
    rows: dict[int, Any] = {}
    figures: dict[int, list[Measurement]] = {number: [] for number in found}
    run, measured = schema.run, schema.measurement
    complete = (
        sa.select(run, schema.model.c.ref, schema.environment.c.hardware, schema.environment.c.facts)
        .join(schema.model, schema.model.c.id == run.c.model)
        .join(schema.environment, schema.environment.c.id == run.c.environment)
    )
    for ids in _chunks(found):
        rows |= {row["id"]: row for row in connection.execute(complete.where(run.c.id.in_(ids))).mappings()}
        detail = sa.select(measured).where(measured.c.run.in_(ids))
        if quantity:
            detail = detail.where(measured.c.quantity == quantity)
        for figure in connection.execute(
            detail.order_by(measured.c.task, measured.c.quantity, measured.c.arm)
        ).mappings():
            figures[figure["run"]].append(
                Measurement(**{part.name: figure[part.name] for part in fields(Measurement)})
            )
    plain = ("key", "method", "device", "dtype", "seed", "status", "started", "seconds", "error")
    more = ("parameters", "config", "protocol", "hardware")
    return [
        Result(
            origin="imported" if IMPORTED in rows[number]["facts"] else origin,
            model=rows[number]["ref"],
            environment=rows[number]["facts"],
            measurements=tuple(figures[number]),
            **{name: rows[number][name] for name in (*plain, *more)},
        )
        for number in found
    ]


def _newest(
    connection: Connection,
    method: str | None,
    model: str | None,
    quantity: str | None,
    status: str | None,
    limit: int | None,
) -> list[int]:
    """Ids of the runs that meet the conditions, newest first, read from the indexes on ``started`` without sorting."""
    run, measured = schema.run, schema.measurement
    query = sa.select(run.c.id, run.c.started, run.c.key)
    if method and "+" in method:
        query = query.where(run.c.method == method)
    elif method:
        holding = sa.select(schema.run_method.c.run).where(schema.run_method.c.slug == method)
        query = query.where(run.c.id.in_(holding))
    if status:
        query = query.where(run.c.status == status)
    if quantity:
        having = sa.select(measured.c.run).where(measured.c.quantity == quantity, measured.c.run == run.c.id)
        query = query.where(having.exists())
    query = query.order_by(run.c.started.desc(), run.c.key.desc()).limit(limit)
    queries = [query]
    if model:  # one query per revision of the model, so that the index on (model, started) serves each
        revisions = connection.execute(
            sa.select(schema.model.c.id).where(schema.model.c.ref == model)
        ).scalars()
        queries = [query.where(run.c.model == number) for number in revisions]
    rows = [row for query in queries for row in connection.execute(query)]
    rows.sort(key=lambda row: (row.started, row.key), reverse=True)
    return [row.id for row in rows[:limit]]


def _chunks(ids: Sequence[int], size: int = 500) -> Iterator[Sequence[int]]:
    """SQLite limits the number of bound values per statement."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
