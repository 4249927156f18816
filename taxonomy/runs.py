"""The user's catalogue: runs, with the environment they were measured in.

It is a SQLite file in the user's data folder, or whatever ``ZOO_CATALOG`` names (a path, or a SQLAlchemy URL such as
``postgresql+psycopg://...`` for a team). It is created on first use, upgraded in one transaction when an older zoo
made it, and never touched by ``zoo catalog build``. Several processes may write and read at once: SQLite runs in WAL
mode and every write is one short ``BEGIN IMMEDIATE`` transaction.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from taxonomy import files, paths, schema
from taxonomy.errors import CatalogError, EmptyCatalogError

Arm = Literal["dense", "method", "ratio"]
Status = Literal["done", "failed", "refused", "interrupted"]

_ARMS = ("dense", "method", "ratio")
_STATUSES = ("done", "failed", "refused", "interrupted")
IMPORTED = "imported"
"""Key of ``Run.environment`` that says which file a run of somebody else came from."""

_STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")


@dataclass(frozen=True)
class Measurement:
    """One measured figure of a run.

    Attributes:
        quantity: what was measured, as ``prefill``, ``decode_rate``, ``peak_memory``, ``perplexity``.
        arm: ``dense`` (the unmodified model), ``method``, or ``ratio`` of the two.
        unit: ``s``, ``tokens/s``, ``bytes``, ``1`` ...
        median: median of the repeats, or the one value.
        spread: half the distance between the quartiles; ``None`` for a single value.
        n: number of repeats.
        task: data set or ability; empty when it does not apply.
    """

    quantity: str
    arm: Arm
    unit: str
    median: float
    spread: float | None = None
    n: int = 1
    task: str = ""


@dataclass(frozen=True)
class Run:
    """One run of a method (or of a stack) on a model, with everything needed to trust it.

    Attributes:
        method: slug, or several joined by ``+``.
        model: reference the model was loaded from.
        started: UTC, ISO 8601, as ``2026-05-04T10:11:12+00:00`` or with ``Z``.
        seconds: wall time of the whole run.
        environment: ``hardware`` (required: one readable line) and versions, commit, threads, operating system ...
            Equal environments are stored once.
        parameters: hyper-parameters as JSON values (``Method.parameters()``).
        model_revision: commit or digest of the weights; empty when unknown.
        model_facts: parameters, architecture ... of the model.
        inputs: what the model was fed: prompt, image, calibration, lengths.
        status: ``done``, ``failed``, ``refused`` or ``interrupted``; ``error`` says why.
        protocol: version of the measuring protocol.
        report: ``zoo.report.Report`` as JSON values.
        key: identifies the run everywhere; recording the same key twice stores it once.
    """

    method: str
    model: str
    started: str
    seconds: float
    environment: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    model_revision: str = ""
    model_facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None
    status: Status = "done"
    error: str | None = None
    protocol: str = "1"
    report: Mapping[str, Any] | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def methods(self) -> tuple[str, ...]:
        """The slugs of a stack, in its order."""
        return tuple(dict.fromkeys(part.strip() for part in self.method.split("+")))

    @property
    def config(self) -> str:
        """Digest of what was asked for: equal for runs that only differ in when and where they ran."""
        asked = [self.method, self.parameters, self.model, self.model_revision, self.inputs]
        return digest([*asked, self.seed, self.dtype, self.device, self.protocol])

    def to_json(self) -> dict[str, Any]:
        """As JSON values; ``from_json`` reads it back. One line of ``taxonomy/measurements/*.jsonl``."""
        return {**vars(self), "measurements": tuple(dict(vars(figure)) for figure in self.measurements)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str = "run") -> Run:
        """Read a run written by ``to_json``.

        Raises:
            CatalogError: a field is missing, unknown or wrong; the sentence begins with ``where``.
        """
        values = dict(row)
        if "key" not in values:  # a fresh key per reading would store the same line again and again
            raise CatalogError(f"{where}: 'key' is missing")
        try:
            measured = [Measurement(**measurement) for measurement in values.pop("measurements", ())]
            run = cls(measurements=tuple(measured), **values)
        except TypeError as error:
            reason = str(error).partition("__init__() ")[2] or str(error)
            raise CatalogError(f"{where}: {reason}") from None
        check_run(run, where)
        return run


def digest(value: Any) -> str:
    """32 hexadecimal digits that depend on the JSON ``value`` alone, not on the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys: equal values, equal text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)


def check_run(run: Run, where: str = "run") -> None:
    """Raise ``CatalogError`` when a field of ``run`` cannot be stored."""

    def refuse(reason: str) -> CatalogError:
        return CatalogError(f"{where}: {reason}")

    if not run.method or not all(run.methods):
        raise refuse("'method' must be a slug, or slugs joined by +")
    if run.status not in _STATUSES:
        raise refuse(f"status '{run.status}' is none of {', '.join(_STATUSES)}")
    if not _STARTED.fullmatch(run.started):
        raise refuse(f"'started' must be UTC in ISO 8601, as 2026-05-04T10:11:12Z, not '{run.started}'")
    if not isinstance(run.environment.get("hardware"), str):
        raise refuse("'environment' must have a text 'hardware'")
    seen = set()
    for row in run.measurements:
        place = (row.task, row.quantity, row.arm)
        if row.arm not in _ARMS:
            raise refuse(f"arm '{row.arm}' of {row.quantity} is none of {', '.join(_ARMS)}")
        if row.n < 1:
            raise refuse(f"{row.quantity} ({row.arm}) has n = {row.n}; at least one repeat is needed")
        if place in seen:
            raise refuse(
                f"{row.quantity} ({row.arm}) is measured twice{' on ' + row.task if row.task else ''}"
            )
        seen.add(place)
    try:
        canonical_json(run.to_json())
    except (TypeError, ValueError) as error:
        raise refuse(f"not storable as JSON: {error}") from None


# --- opening --------------------------------------------------------------------------------------------------


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
        with _plain_errors(self.place), self.engine.begin() as connection:
            _wait_for_other_writers(connection)
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
    if "://" not in place:
        try:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CatalogError(_unwritable(place, error.strerror or str(error))) from None
    engine = _engine(place)
    try:
        with _plain_errors(place), engine.begin() as connection:
            _prepare(connection, place)
    except BaseException:
        engine.dispose()
        raise
    return RunStore(engine, place)


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


def _engine(place: str) -> Engine:
    """Engine with JSON in canonical form; on SQLite with WAL, foreign keys and explicit transactions."""
    if "://" in place:
        try:
            engine = sa.create_engine(place, json_serializer=canonical_json)
        except ModuleNotFoundError as error:
            raise CatalogError(
                f"{paths.SETTING}: the driver {error.name} is not installed; write postgresql+psycopg://... and "
                "install it with: pip install 'efficiency-zoo[postgres]'"
            ) from None
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise CatalogError(f"{paths.SETTING}: {first_line(error)}") from None
        if engine.dialect.name not in ("sqlite", "postgresql"):
            raise CatalogError(
                f"{paths.SETTING}: {engine.dialect.name} is not supported; use SQLite or PostgreSQL"
            )
        if engine.dialect.name == "postgresql":
            return engine
        place = engine.url.database or ""
        engine.dispose()
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=place),
        json_serializer=canonical_json,
        connect_args={"timeout": files.BUSY_SECONDS},
    )

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not guessed by the driver
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")  # with WAL: consistent after a crash, and quick

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Taking the write lock at once lets busy_timeout apply; a read lock upgraded later would fail instead.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _prepare(connection: Connection, place: str) -> None:
    """Inside a write transaction: make the tables of a new catalogue, or bring older ones up to date."""
    _wait_for_other_writers(connection)
    if connection.dialect.name == "sqlite" and not _is_ours(connection, place):
        _make_wal(connection)
        connection.exec_driver_sql(f"PRAGMA application_id = {files.APPLICATION_ID}")
    if not _is_made(connection, place):
        schema.create_all(connection)
        connection.execute(schema.meta.insert().values(key="kind", value="runs"))
        return
    revision = str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())
    if revision > files.REVISION:
        raise files.newer(shown(place), revision)
    if revision < files.REVISION:
        upgrade(connection)


def _wait_for_other_writers(connection: Connection) -> None:
    """On PostgreSQL: one writing transaction at a time, as on SQLite, so that none can block another for good."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({files.APPLICATION_ID})")


def _is_made(connection: Connection, place: str) -> bool:
    """Whether there are tables of a catalogue.

    Raises:
        CatalogError: another program keeps its migrations in this database.
    """
    tables = sa.inspect(connection)
    if not tables.has_table("alembic_version"):
        return False
    if not tables.has_table(schema.run_method.name):
        raise CatalogError(
            f"{shown(place)} holds tables of another program; name another database or search_path"
        )
    return True


def _is_ours(connection: Connection, place: str) -> bool:
    """Whether the SQLite file is a catalogue already; ``False`` when it is empty.

    Raises:
        CatalogError: it holds somebody else's tables.
    """
    stamped = connection.exec_driver_sql("PRAGMA application_id").scalar() == files.APPLICATION_ID
    tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
    if tables and not stamped:
        raise files.foreign(place)
    return bool(tables)


def _make_wal(connection: Connection) -> None:
    """Switch a new, empty file to WAL, which cannot be done inside a transaction.

    Several processes may be at it. SQLite lets a transaction wait for them, but not this switch.
    """
    connection.exec_driver_sql("ROLLBACK")
    deadline = time.monotonic() + files.BUSY_SECONDS
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            break
        except OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def upgrade(connection: Connection) -> None:
    """Run the migrations that are missing, inside the caller's transaction, and make the views anew."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(paths.MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    schema.drop_views(connection)  # a view holds on to its tables as they are
    command.upgrade(config, files.REVISION)
    schema.create_views(connection)


# --- writing and reading --------------------------------------------------------------------------------------


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
    return {**own, "config": run.config, "model": model_id, "environment": environment_id}


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


@contextmanager
def reading(place: str) -> Iterator[Connection]:
    """A connection that cannot write, also to a file of which neither it nor its folder may be written.

    A catalogue that an older zoo made is upgraded first.

    Raises:
        CatalogError: the catalogue at ``place`` cannot be read.
        EmptyCatalogError: the file holds nothing yet.
    """
    with _plain_errors(place):
        if "://" in place:
            engine = _engine(place)
        else:
            engine = sa.create_engine(
                "sqlite://", creator=lambda: files.connect(Path(place)), poolclass=sa.pool.NullPool
            )
        try:
            with engine.connect() as connection:
                if connection.dialect.name == "postgresql":
                    # One state of the database for all queries, however many runs are stored meanwhile; and of the
                    # session, not of one transaction, so that a COMMIT in a query does not make it writable.
                    connection.exec_driver_sql(
                        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
                    )
                    connection.commit()
                if not _is_made(connection, place):
                    raise EmptyCatalogError(f"{shown(place)} holds nothing yet")
                _bring_up_to_date(connection, place)
                yield connection
        finally:
            engine.dispose()


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


def _bring_up_to_date(connection: Connection, place: str) -> None:
    """Upgrade an older file before it is queried (another connection does it; ``connection`` sees the result)."""
    revision = str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())
    if revision > files.REVISION:
        raise files.newer(shown(place), revision)
    if revision < files.REVISION:
        connection.rollback()
        open_runs(place).close()


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


# --- errors ---------------------------------------------------------------------------------------------------


@contextmanager
def _plain_errors(place: str) -> Iterator[None]:
    """Turn what the database says into one sentence that says what to do."""
    try:
        yield
    except OperationalError as error:
        said = first_line(error)
        if "locked" in said or "busy" in said:
            raise files.busy(shown(place)) from None
        if any(sign in said for sign in ("readonly", "unable to open", "permission")):
            reason = _unwritable(place, said)
        else:
            reason = f"{shown(place)}: {said}"
        raise CatalogError(reason) from None
    except DatabaseError as error:
        if type(error) is not DatabaseError:  # a subclass: the file is sound, the statement is not
            raise CatalogError(f"{shown(place)}: {first_line(error)}") from None
        raise files.damaged(shown(place), first_line(error)) from None
    except SQLAlchemyError as error:
        raise CatalogError(f"{shown(place)}: {first_line(error)}") from None


def shown(place: str) -> str:
    """``place`` without a password."""
    if "://" not in place:
        return place
    return sa.make_url(place).render_as_string(hide_password=True)


def first_line(error: Exception) -> str:
    """What the driver said, without SQLAlchemy's additions."""
    said = getattr(error, "orig", None) or error
    lines = str(said).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _unwritable(place: str, reason: str) -> str:
    return f"{shown(place)} cannot be written ({reason}); set {paths.SETTING} to a file that can"
