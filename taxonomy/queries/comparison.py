"""Methods side by side."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from taxonomy.errors import QueryError
from taxonomy.queries.names import labels, resolve
from taxonomy.queries.page import MethodPage, default_text, show
from taxonomy.vocabulary import FACETS, PROPERTIES


@dataclass(frozen=True)
class Comparison:
    """Methods side by side. A row holds one text per method; ``same`` = all of them are equal."""

    methods: tuple[MethodPage, ...]
    rows: tuple[ComparisonRow, ...]


@dataclass(frozen=True)
class ComparisonRow:
    """One question, and each method's answer."""

    group: str
    label: str
    values: tuple[str, ...]
    same: bool


def compare(db: sqlite3.Connection, names: Sequence[str]) -> Comparison:
    """Two or more methods side by side: what they are, facets, properties, parameters.

    Raises:
        QueryError: fewer than two different names, or one that does not exist.
    """
    slugs = list(dict.fromkeys(resolve(db, name) for name in names))
    if len(slugs) < 2:
        raise QueryError("compare needs at least two different methods, as: zoo compare flap cfsp")
    pages = tuple(show(db, slug) for slug in slugs)
    rows: list[ComparisonRow] = []

    def add(group: str, label: str, values: Iterable[str]) -> None:
        texts = tuple(values)
        if any(texts):
            rows.append(ComparisonRow(group, label, texts, len(set(texts)) == 1))

    add("what", "Year", (str(page.year) for page in pages))
    add("what", "Venue", (page.venue or "" for page in pages))
    add("what", "Kind", (page.kind for page in pages))
    add("what", "Runs here", ("yes" if page.implemented else "not yet" for page in pages))
    add("what", "Official code", (page.code_license or "no licence" if page.code else "" for page in pages))
    for facet in FACETS.values():
        group = "facets" if facet.view == "core" else facet.view
        add(group, facet.label, (", ".join(labels(facet, page.facets.get(facet.id, ()))) for page in pages))
    for prop in PROPERTIES.values():
        words = {True: "yes", False: "no", None: ""}
        add("properties", prop.label, (words[page.properties.get(prop.id)] for page in pages))
    for name in dict.fromkeys(parameter.name for page in pages for parameter in page.parameters):
        defaults = (
            {parameter.name: default_text(parameter) for parameter in page.parameters} for page in pages
        )
        add("parameters", name, (known.get(name, "") for known in defaults))
    return Comparison(pages, tuple(rows))
