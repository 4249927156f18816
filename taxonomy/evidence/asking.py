"""The same questions to any catalogue: a file, or a database server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from taxonomy import files
from taxonomy.errors import EmptyCatalogError

Question = tuple[str, Mapping[str, Any]]
"""A query with its bound values."""


def bound_names(letter: str, count: int) -> str:
    """``:q0, :q1``: bound values in a list; an empty list matches nothing."""
    return ", ".join(f":{letter}{index}" for index in range(count)) or "NULL"


def answers_of(place: str, questions: Sequence[Question]) -> list[list[Sequence[Any]]]:
    """Answers of the catalogue at ``place``; nothing to each question when it does not exist yet."""
    if "://" in place:
        import sqlalchemy as sa

        from taxonomy.runs import reading

        with suppress(EmptyCatalogError), reading(place) as connection:
            return [
                [tuple(row) for row in connection.execute(sa.text(query), dict(values))]
                for query, values in questions
            ]
    elif Path(place).is_file():
        with (
            suppress(EmptyCatalogError),
            files.plain_errors(place),
            closing(files.connect(Path(place))) as db,
        ):
            return [db.execute(query, dict(values)).fetchall() for query, values in questions]
    return [[] for _ in questions]
