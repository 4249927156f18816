"""Storing runs. Every write is one short transaction."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from taxonomy import paths, schema
from taxonomy.runs.database import opened, wait_for_other_writers
from taxonomy.runs.refusals import plain_errors
from taxonomy.runs.run import Run, check_run, digest


class RunStore:
    """An open user's catalogue. Make one with ``open_runs``; it is a context manager."""

    def __init__(self, engine: Engine, place: str) -> None:
        self.engine = engine
        self.place = place

    def record(self, run: Run) -> str:
        """Store ``run`` in one transaction and return its key; a key that is there already changes nothing.

        Raises:
            CatalogError: the run is not storable, or the catalogue cannot be written.
        """
        check_run(run)
        with self.writing() as connection:
            insert_run(connection, run)
        return run.key

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction: all that is written in it is kept, or, after an exception, nothing."""
        with plain_errors(self.place), self.engine.begin() as connection:
            wait_for_other_writers(connection)
            yield connection

    def close(self) -> None:
        """Release the connections."""
        self.engine.dispose()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_runs(where: str | None = None) -> RunStore:
    """Open the user's catalogue for writing, creating or upgrading it when needed.

    Args:
        where: file or SQLAlchemy URL; ``None`` = ``ZOO_CATALOG``, else the platform's folder for user data.

    Raises:
        CatalogError: damaged or foreign file, folder that cannot be written, busy file, or one of a newer zoo.
    """
    place = where or paths.user_catalog()
    return RunStore(opened(place), place)


def record_run(run: Run | Mapping[str, Any], where: str | None = None) -> str:
    """Store one run in the user's catalogue and return its key.

    Args:
        run: a ``Run``, or its JSON form (``Run.to_json``; ``key`` may then be left out).
        where: file or SQLAlchemy URL; ``None`` = the user's own catalogue.

    Raises:
        CatalogError: the run is not storable, or the catalogue cannot be opened or written.

    >>> record_run(
    ...     Run(
    ...         method="flap",
    ...         parameters={"sparsity": 0.3},
    ...         model="smollm2-135m",
    ...         started="2026-05-04T10:11:12Z",
    ...         seconds=12.5,
    ...         environment={"hardware": "2 x86-64 cores", "torch": "2.13.0"},
    ...         measurements=(
    ...             Measurement("prefill", "dense", "s", 0.41, 0.01, 5),
    ...             Measurement("prefill", "method", "s", 0.33, 0.01, 5),
    ...         ),
    ...     )
    ... )  # doctest: +SKIP
    """
    if not isinstance(run, Run):
        run = Run.from_json({"key": uuid.uuid4().hex, **run})
    with open_runs(where) as store:
        return store.record(run)


def insert_run(connection: Connection, run: Run) -> None:
    """Add ``run`` with its model, environment and measurements, inside the caller's transaction."""
    model_id = _find_or_add(
        connection,
        schema.model,
        {"ref": run.model, "revision": run.model_revision},
        {"facts": dict(run.model_facts)},
    )
    environment_id = _find_or_add(
        connection,
        schema.environment,
        {"digest": digest(run.environment)},
        {"hardware": run.environment["hardware"], "facts": dict(run.environment)},
    )
    row = run_row(run, model_id, environment_id)
    adding = _insert(connection, schema.run).values(**row).on_conflict_do_nothing()
    run_id = connection.execute(adding.returning(schema.run.c.id)).scalar()
    if run_id is None:  # its key is there already
        return
    connection.execute(schema.run_method.insert(), [{"slug": slug, "run": run_id} for slug in run.methods])
    if run.measurements:
        connection.execute(
            schema.measurement.insert(), [{**vars(figure), "run": run_id} for figure in run.measurements]
        )


def run_row(run: Run, model_id: int, environment_id: int) -> dict[str, Any]:
    """The row of ``run`` in its table; its figures, its model and its environment stand in others."""
    elsewhere = ("model", "model_revision", "model_facts", "environment", "measurements")
    own = {name: value for name, value in vars(run).items() if name not in elsewhere}
    worked_out = {"config": run.config, "trial": run.trial}
    return {**own, **worked_out, "model": model_id, "environment": environment_id}


def _insert(connection: Connection, table: sa.Table) -> Any:
    """The dialect's own ``INSERT``, which knows ``ON CONFLICT``."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def _find_or_add(
    connection: Connection, table: sa.Table, natural: Mapping[str, Any], more: Mapping[str, Any]
) -> int:
    """Id of the row with the ``natural`` key, which is added with the values ``more`` when it is new."""
    query = sa.select(table.c.id).where(*(table.c[name] == value for name, value in natural.items()))
    found = connection.execute(query).scalar()
    if found is None:
        connection.execute(_insert(connection, table).values(**natural, **more).on_conflict_do_nothing())
        found = connection.execute(query).scalar_one()
    return int(found)
