"""The taxonomy as trees of terms, and as a glossary."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from taxonomy.errors import QueryError
from taxonomy.queries.conditions import marks
from taxonomy.queries.names import find_facet
from taxonomy.vocabulary import FACETS, Facet


@dataclass(frozen=True)
class Node:
    """A term in a tree. Counts and ``methods`` take in everything below."""

    id: str
    label: str
    definition: str
    count: int
    implemented: int
    methods: tuple[str, ...]
    children: tuple[Node, ...]


@dataclass(frozen=True)
class Tree:
    """The terms of one facet as a tree."""

    facet: str
    label: str
    question: str
    view: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class TermRow:
    """A glossary entry; ``count`` are the cards that use the term itself."""

    facet: str
    id: str
    label: str
    definition: str
    parent: str | None
    count: int


def views() -> tuple[str, ...]:
    """Names of the views: ``core``, then one per survey whose tree the facets repeat."""
    return tuple(dict.fromkeys(facet.view for facet in FACETS.values()))


def find_view(name: str) -> str:
    """The view called ``name``, or the only one that begins with it; raises ``QueryError``."""
    wanted = name.lower().replace("_", "-")
    matching = [view for view in views() if view == wanted] or [v for v in views() if v.startswith(wanted)]
    if len(matching) != 1:
        raise QueryError(f"there is no view '{name}'; known: {', '.join(views())}")
    return matching[0]


def tree(db: sqlite3.Connection, view: str = "core", facet: str | None = None) -> list[Tree]:
    """The facets of a view (or one facet alone) as trees of terms with the methods that use them.

    Raises:
        QueryError: unknown view or facet.
    """
    chosen = [find_facet(facet)] if facet else [f for f in FACETS.values() if f.view == find_view(view)]
    query = f"SELECT facet, term, cards, implemented, methods FROM term_use WHERE facet IN ({marks(chosen)})"
    used = {row[:2]: row[2:] for row in db.execute(query, [facet.id for facet in chosen])}

    def node(facet: Facet, term_id: str) -> Node:
        term = facet[term_id]
        count, implemented, methods = used[facet.id, term_id]
        return Node(
            id=term.id,
            label=term.label,
            definition=term.definition,
            count=count,
            implemented=implemented,
            methods=tuple(methods.split()),
            children=tuple(node(facet, child.id) for child in facet.terms if child.parent == term_id),
        )

    return [
        Tree(
            facet=facet.id,
            label=facet.label,
            question=facet.question,
            view=facet.view,
            nodes=tuple(node(facet, term.id) for term in facet.terms if term.parent is None),
        )
        for facet in chosen
    ]


def terms(db: sqlite3.Connection, facet: str | None = None) -> list[TermRow]:
    """The glossary: all terms (of one facet), in the order of the vocabulary; raises ``QueryError``."""
    chosen = [find_facet(facet)] if facet else list(FACETS.values())
    counted = "SELECT facet, term, count(*) FROM method_term GROUP BY facet, term"
    counts = {(name, term): count for name, term, count in db.execute(counted)}
    return [
        TermRow(f.id, term.id, term.label, term.definition, term.parent, counts.get((f.id, term.id), 0))
        for f in chosen
        for term in f.terms
    ]
