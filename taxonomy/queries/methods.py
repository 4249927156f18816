"""Lists of methods: by conditions, or by words."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from taxonomy.errors import QueryError
from taxonomy.queries.conditions import Conditions, Years, below, marks, match_expression
from taxonomy.queries.names import find_facet, find_term, nearest
from taxonomy.queries.stored_json import StoredFacets, StoredProperties
from taxonomy.vocabulary import PROPERTIES

KINDS = ("method", "baseline", "benchmark", "survey", "analysis")

ACTING = ("method", "baseline")
"""Kinds of card that change how a model runs: what ``zoo list`` shows by default."""


class MethodRow(NamedTuple):
    """A method in a list. ``facets`` holds term ids by facet, ``properties`` yes or no by property.

    A tuple, because a list has thousands of them and a frozen dataclass takes three times as long to make.
    """

    slug: str
    name: str
    year: int
    kind: str
    family: str
    implemented: bool
    summary: str
    facets: Mapping[str, tuple[str, ...]]
    properties: Mapping[str, bool]


def find(
    db: sqlite3.Connection,
    *,
    include: Mapping[str, Sequence[Sequence[str]]] | None = None,
    exclude: Mapping[str, Sequence[str]] | None = None,
    properties: Mapping[str, bool] | None = None,
    implemented: bool | None = None,
    years: Years | None = None,
    name: str | None = None,
    kinds: Sequence[str] = ACTING,
) -> list[MethodRow]:
    """Methods that meet all conditions, sorted by slug.

    Args:
        db: connection from ``open_catalog``.
        include: facet -> alternatives; a method must have, for each, one of its terms or a term below it.
        exclude: facet -> terms that a method must not have, nor any below them.
        properties: property -> value stated on the card. A card that leaves the property out meets neither value.
        implemented: only what runs, or only what does not.
        years: first and last year of publication.
        name: part of the slug or of the name.
        kinds: kinds of card.

    Raises:
        QueryError: unknown facet, term, property or kind.
    """
    wanted, stated, tables = Conditions(), Conditions(), list[str]()
    for facet_name, groups in (include or {}).items():
        facet = find_facet(facet_name)
        for group in groups:
            terms = below(facet, [find_term(facet, term) for term in group])
            table = f"t{len(tables)}"
            tables.append(f"method_term {table}")
            stated.add(f"{table}.facet = ? AND {table}.term IN ({marks(terms)})", facet.id, *terms)
    for prop, value in (properties or {}).items():
        table = f"t{len(tables)}"
        tables.append(f"method_property {table}")
        stated.add(f"{table}.property = ? AND {table}.value = ?", _property(prop), int(value))
    if tables:
        # What cards state is decided by joining indexes alone: of ``method`` only rows that are wanted are read.
        joined = " JOIN ".join([tables[0], *(f"{table} USING (method)" for table in tables[1:])])
        wanted.add(f"m.slug IN (SELECT method FROM {joined}{stated.where})", *stated.values)
    for facet_name, names in (exclude or {}).items():
        facet = find_facet(facet_name)
        terms = below(facet, [find_term(facet, term) for term in names])
        wanted.add(
            f"m.slug NOT IN (SELECT method FROM method_term WHERE facet = ? AND term IN ({marks(terms)}))",
            facet.id,
            *terms,
        )
    if implemented is not None:
        wanted.add("m.implemented = ?", int(implemented))
    if name:
        wanted.add("(instr(m.slug, ?) OR instr(lower(m.name), ?))", name.lower(), name.lower())
    wanted.years("m.year", years)
    wanted.add(f"m.kind IN ({marks(kinds)})", *(_kind(kind) for kind in kinds))
    return _methods(db, wanted.where + " ORDER BY m.slug", wanted.values)


def list_methods(
    db: sqlite3.Connection,
    *,
    family: str | None = None,
    implemented: bool | None = None,
    kinds: Sequence[str] = ACTING,
) -> list[MethodRow]:
    """All cards of these kinds, sorted by slug; see ``find`` for more conditions."""
    include = {"family": [[family]]} if family else None
    return find(db, include=include, implemented=implemented, kinds=kinds)


def search(db: sqlite3.Connection, words: str, limit: int = 20) -> list[MethodRow]:
    """Cards that hold all ``words`` in name, title, summary, notes or terms, best first.

    A hit in the name weighs most, one in the notes least.

    Raises:
        QueryError: there is nothing to look for.
    """
    expression = match_expression(words)
    if expression is None:
        raise QueryError("search needs at least one word")
    query = (
        " JOIN (SELECT rowid AS hit, bm25(method_fts, 10, 10, 6, 3, 1) AS badness FROM method_fts"
        " WHERE method_fts MATCH ?) ON hit = m.id ORDER BY badness, m.slug LIMIT ?"
    )
    return _methods(db, query, [expression, limit])


def _methods(db: sqlite3.Connection, tail: str, values: Sequence[Any]) -> list[MethodRow]:
    """Rows of ``method m`` chosen by ``tail``, with their facets and properties."""
    columns = "m.slug, m.name, m.year, m.kind, m.family, m.implemented, m.summary, m.facets, m.properties"
    rows = db.execute(f"SELECT {columns} FROM method m{tail}", values).fetchall()
    return [
        MethodRow(
            slug,
            name,
            year,
            kind,
            family,
            bool(runs),
            summary,
            StoredFacets(facets),
            StoredProperties(stated),
        )
        for slug, name, year, kind, family, runs, summary, facets, stated in rows
    ]


def _property(name: str) -> str:
    found = name.replace("-", "_")
    if found not in PROPERTIES:
        raise QueryError(f"there is no property '{name}'; {nearest(found, PROPERTIES)}")
    return found


def _kind(name: str) -> str:
    if name not in KINDS:
        raise QueryError(f"there is no kind of card '{name}'; known: {', '.join(KINDS)}")
    return name
