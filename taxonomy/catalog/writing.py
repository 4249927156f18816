"""Writing the catalogue.

The same sources give the same bytes (with the same SQLite library): rows go in in a fixed order, nothing carries a
time, and the file is vacuumed. It is written aside and renamed, so readers never see half of it; when nothing changed
nothing is written.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from taxonomy import files, paths, schema
from taxonomy.catalog.filling import fill_text, insert
from taxonomy.catalog.filling_runs import fill_runs
from taxonomy.catalog.sources import Sources
from taxonomy.errors import CatalogError
from taxonomy.runs import canonical_json
from taxonomy.working_out import work_out


def build(sources: Sources, target: Path | None = None) -> bool:
    """Write the catalogue made from ``sources`` to ``target`` (default: the one reading commands use).

    Returns:
        Whether anything was written: an unchanged catalogue is left alone.

    Raises:
        CatalogError: the sources contradict each other, or ``target`` cannot be written.
    """
    target = target or paths.catalog_file()
    content = built_bytes(sources)
    try:
        if target.is_file() and target.read_bytes() == content:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(aside).chmod(0o644)
            Path(aside).replace(target)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CatalogError(f"{target} cannot be written: {error.strerror or error}") from None
    return True


def built_bytes(sources: Sources) -> bytes:
    """The catalogue made from ``sources``, as the bytes of a SQLite file."""
    with tempfile.TemporaryDirectory(prefix="zoo-catalog-") as folder:
        path = Path(folder) / "catalog.sqlite"
        engine = sa.create_engine(f"sqlite:///{path}", json_serializer=canonical_json)

        @sa.event.listens_for(engine, "connect")
        def _configure(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA page_size = 4096")
            connection.execute("PRAGMA journal_mode = OFF")  # a scratch file: on failure it is thrown away
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA application_id = {files.APPLICATION_ID}")

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        try:
            with engine.begin() as connection:
                schema.create_all(connection)
                schema.create_tables(connection, schema.worked_out)
                insert(connection, schema.meta, [{"key": "kind", "value": "built"}])
                fill_text(connection, sources)
                fill_runs(connection, sources.runs)
                work_out(connection)
                schema.index_text(connection)
        finally:
            engine.dispose()
        finished = sqlite3.connect(path, isolation_level=None)
        try:
            finished.execute("ANALYZE")
            finished.execute("VACUUM")
        finally:
            finished.close()
        return path.read_bytes()
