"""What the database says, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from taxonomy import files, paths
from taxonomy.errors import CatalogError


@contextmanager
def plain_errors(place: str) -> Iterator[None]:
    """Turn what the database says into one sentence that says what to do."""
    try:
        yield
    except OperationalError as error:
        said = first_line(error)
        if "locked" in said or "busy" in said:
            raise files.busy(shown(place)) from None
        if any(sign in said for sign in ("readonly", "unable to open", "permission")):
            reason = unwritable(place, said)
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


def unwritable(place: str, reason: str) -> str:
    """The sentence about a catalogue whose file or folder is closed to the user."""
    return f"{shown(place)} cannot be written ({reason}); set {paths.SETTING} to a file that can"
