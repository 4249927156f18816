"""Two facets crossed: what has been done, and what is missing."""

from __future__ import annotations

import sqlite3
from collections.abc import Set
from dataclasses import dataclass

from taxonomy.errors import QueryError
from taxonomy.queries.bibliography import TopicGap, topics
from taxonomy.queries.conditions import marks
from taxonomy.queries.methods import ACTING
from taxonomy.queries.names import find_facet
from taxonomy.vocabulary import Facet


@dataclass(frozen=True)
class Cell:
    """A combination of two terms; ``expected`` is the count if the two facets were independent."""

    row: str
    column: str
    count: int
    implemented: int
    expected: float
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """Two facets crossed: every combination, empty ones included, row by row."""

    rows: str
    columns: str
    row_terms: tuple[str, ...]
    column_terms: tuple[str, ...]
    cells: tuple[Cell, ...]

    def cell(self, row: str, column: str) -> Cell:
        """The cell of two terms."""
        place = self.row_terms.index(row) * len(self.column_terms) + self.column_terms.index(column)
        return self.cells[place]


@dataclass(frozen=True)
class Gaps:
    """What is not there yet, most striking first.

    ``unimplemented``: combinations with cards of which none runs. ``empty``: combinations without a card, although
    both terms are used (by ``expected``). ``topics``: of the bibliography, by papers without a card.
    """

    rows: str
    columns: str
    unimplemented: tuple[Cell, ...]
    empty: tuple[Cell, ...]
    topics: tuple[TopicGap, ...]


def matrix(db: sqlite3.Connection, rows: str = "where", columns: str = "signal") -> Matrix:
    """Cross two facets over methods and baselines; every pair of terms that are used at all has a cell.

    Raises:
        QueryError: unknown facet, or the same facet twice.
    """
    across, down = find_facet(columns), find_facet(rows)
    if across.id == down.id:
        raise QueryError(f"a matrix needs two different facets, not '{rows}' twice")
    acting = dict(db.execute(f"SELECT slug, implemented FROM method WHERE kind IN ({marks(ACTING)})", ACTING))
    in_row, in_column = (_acting(db, facet, acting.keys()) for facet in (down, across))
    cells = []
    for row, its in in_row.items():
        for column, others in in_column.items():
            slugs = tuple(sorted(its & others))
            runs = sum(acting[slug] for slug in slugs)
            expected = round(len(its) * len(others) / len(acting), 3)
            cells.append(Cell(row, column, len(slugs), runs, expected, slugs))
    return Matrix(down.id, across.id, tuple(in_row), tuple(in_column), tuple(cells))


def _acting(db: sqlite3.Connection, facet: Facet, acting: Set[str]) -> dict[str, Set[str]]:
    """Of each term in use, in the order of the vocabulary: those of ``acting`` whose card names it."""
    query = "SELECT term, group_concat(method) FROM method_term WHERE facet = ? GROUP BY term"
    named = {term: acting & slugs.split(",") for term, slugs in db.execute(query, (facet.id,))}
    return {term.id: named[term.id] for term in facet.terms if named.get(term.id)}


def gaps(db: sqlite3.Connection, rows: str = "where", columns: str = "signal") -> Gaps:
    """What is missing: combinations nobody has implemented, combinations nobody has tried, topics without cards.

    Raises:
        QueryError: unknown facet, or the same facet twice.
    """
    crossed = matrix(db, rows, columns)
    unimplemented = [cell for cell in crossed.cells if cell.count and not cell.implemented]
    empty = [cell for cell in crossed.cells if not cell.count]
    return Gaps(
        rows=crossed.rows,
        columns=crossed.columns,
        unimplemented=tuple(sorted(unimplemented, key=lambda cell: (-cell.count, cell.row, cell.column))),
        empty=tuple(sorted(empty, key=lambda cell: (-cell.expected, cell.row, cell.column))),
        topics=tuple(sorted(topics(db), key=lambda row: (row.cards - row.papers, row.topic))),
    )
