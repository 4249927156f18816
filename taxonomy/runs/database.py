"""The database of the user's catalogue: opened, made, upgraded, and locked so that several processes can share it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from taxonomy import files, paths, schema
from taxonomy.errors import CatalogError, EmptyCatalogError
from taxonomy.runs.refusals import first_line, plain_errors, shown, unwritable
from taxonomy.runs.run import canonical_json


def opened(place: str) -> Engine:
    """The database at ``place``, for writing; created or upgraded when needed.

    Raises:
        CatalogError: damaged or foreign file, folder that cannot be written, busy file, or one of a newer zoo.
    """
    if "://" not in place:
        try:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CatalogError(unwritable(place, error.strerror or str(error))) from None
    engine = _engine(place)
    try:
        with plain_errors(place), engine.begin() as connection:
            _prepare(connection, place)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(place: str) -> Iterator[Connection]:
    """A connection that cannot write, also to a file of which neither it nor its folder may be written.

    A catalogue that an older zoo made is upgraded first.

    Raises:
        CatalogError: the catalogue at ``place`` cannot be read.
        EmptyCatalogError: the file holds nothing yet.
    """
    with plain_errors(place):
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


def _bring_up_to_date(connection: Connection, place: str) -> None:
    """Upgrade an older file before it is queried (another connection does it; ``connection`` sees the result)."""
    if _is_older(connection, place):
        connection.rollback()
        opened(place).dispose()


def _engine(place: str) -> Engine:
    """Engine for a file or a URL, with JSON in canonical form."""
    if "://" not in place:
        return _sqlite(place)
    try:
        engine = sa.create_engine(place, json_serializer=canonical_json)
    except ModuleNotFoundError as error:
        raise CatalogError(
            f"{paths.SETTING}: the driver {error.name} is not installed; write postgresql+psycopg://... and "
            "install it with: pip install 'efficiency-zoo[postgres]'"
        ) from None
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise CatalogError(f"{paths.SETTING}: {first_line(error)}") from None
    dialect = engine.dialect.name
    if dialect == "postgresql":
        return engine
    if dialect != "sqlite":
        raise CatalogError(f"{paths.SETTING}: {dialect} is not supported; use SQLite or PostgreSQL")
    engine.dispose()
    return _sqlite(engine.url.database or "")


def _sqlite(file: str) -> Engine:
    """Engine for a SQLite file, with foreign keys and explicit transactions."""
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=file),
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
    wait_for_other_writers(connection)
    if connection.dialect.name == "sqlite" and not _is_ours(connection, place):
        _make_wal(connection)
        connection.exec_driver_sql(f"PRAGMA application_id = {files.APPLICATION_ID}")
    if not _is_made(connection, place):
        schema.create_all(connection)
        connection.execute(schema.meta.insert().values(key="kind", value="runs"))
        return
    if _is_older(connection, place):
        upgrade(connection)


def _is_older(connection: Connection, place: str) -> bool:
    """Whether an older zoo made the tables.

    Raises:
        CatalogError: a newer one did.
    """
    revision = str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())
    if revision > files.REVISION:
        raise files.newer(shown(place), revision)
    return revision < files.REVISION


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


def wait_for_other_writers(connection: Connection) -> None:
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
