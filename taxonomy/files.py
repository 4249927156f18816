"""SQLite files of the zoo: how they are recognised and opened for reading.

Standard library only, so that reading commands answer at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taxonomy.errors import CatalogError, EmptyCatalogError

REVISION = "0002"
"""Newest Alembic revision. Revisions are zero-padded numbers, so they compare as text."""

APPLICATION_ID = 0x5A6F6F43
"""``PRAGMA application_id`` of our files ("ZooC"): how somebody else's file is told apart."""

BUSY_SECONDS = 15.0
"""How long one process waits for another one's write."""


def connect(path: Path, *, immutable: bool = False) -> sqlite3.Connection:
    """Open a catalogue for reading only.

    Args:
        path: the file.
        immutable: nobody writes to it while it is open (the built catalogue is replaced, never changed), so no
            lock is taken and a read-only folder is fine.

    Raises:
        CatalogError: missing, damaged or foreign file, or one of a newer zoo.
        EmptyCatalogError: the file has no table at all.
    """
    if not path.is_file():
        raise CatalogError(f"there is no catalogue at {path}; make it with: zoo catalog build")
    with plain_errors(str(path)):
        connection = _connect(path, immutable)
        try:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
        except sqlite3.OperationalError as error:
            connection.close()
            if "unable to open" not in str(error):
                raise
            # WAL needs a companion file, which a folder without write permission cannot have.
            connection = _connect(path, immutable=True)
            application = connection.execute("PRAGMA application_id").fetchone()[0]
        try:
            if application != APPLICATION_ID:
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise foreign(str(path))
                raise EmptyCatalogError(f"{path} is empty; remove it, or name another file")
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
            if revision > REVISION:
                raise newer(str(path), revision)
        except BaseException:
            connection.close()
            raise
    return connection


def _connect(path: Path, immutable: bool) -> sqlite3.Connection:
    mode = "immutable=1" if immutable else "mode=ro"
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_SECONDS)
    connection.execute("PRAGMA query_only = ON")
    return connection


@contextmanager
def plain_errors(place: str) -> Iterator[None]:
    """Turn what SQLite says about the file ``place`` into one sentence that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        said = str(error)
        if "locked" in said or "busy" in said:
            raise busy(place) from None
        raise CatalogError(f"{place}: {said}") from None
    except sqlite3.DatabaseError as error:
        raise damaged(place, str(error)) from None


def busy(place: str) -> CatalogError:
    """Another process holds the write lock."""
    return CatalogError(
        f"{place} is busy: another program has been writing for {BUSY_SECONDS:.0f} s; try again"
    )


def foreign(place: str) -> CatalogError:
    """The file belongs to another program."""
    return CatalogError(f"{place} is a SQLite file, but not a catalogue of the zoo; name another file")


def newer(place: str, revision: str) -> CatalogError:
    """The file was made by a later version."""
    return CatalogError(
        f"{place} was made by a newer zoo (schema {revision}, this one knows {REVISION}); "
        "upgrade with: pip install -U efficiency-zoo"
    )


def damaged(place: str, reason: str) -> CatalogError:
    """The file cannot be read as a database."""
    return CatalogError(f"{place} is damaged ({reason}); restore it from a copy, or move it out of the way")
