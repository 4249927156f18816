"""What users call things: catalogue, cards, facets and terms. A wrong name is answered with the nearest ones."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from taxonomy import files, paths
from taxonomy.errors import CatalogError, QueryError
from taxonomy.vocabulary import FACETS, Facet


def open_catalog(path: Path | None = None) -> sqlite3.Connection:
    """Open the built catalogue for reading.

    Raises:
        CatalogError: it is missing, damaged, foreign, or made by another version of the zoo.
    """
    path = path or paths.catalog_file()
    db = files.connect(path, immutable=True)
    (revision,) = db.execute("SELECT version_num FROM alembic_version").fetchone()
    if revision != files.REVISION:
        db.close()
        raise CatalogError(f"{path} was built by an older zoo (schema {revision}); run: zoo catalog build")
    return db


def find_facet(name: str) -> Facet:
    """The facet called ``name`` (dashes and underscores are alike); raises ``QueryError`` with the nearest names."""
    found = FACETS.get(name.replace("-", "_").lower())
    if found is None:
        raise QueryError(f"there is no facet '{name}'; {nearest(name, FACETS)}")
    return found


def find_term(facet: Facet, name: str) -> str:
    """Id of the term called ``name`` (id or label); raises ``QueryError`` with the nearest ids."""
    wanted = name.strip().lower().replace("_", "-")
    for term in facet.terms:
        if wanted in (term.id, term.label.lower()):
            return term.id
    raise QueryError(f"{facet.id} has no term '{name}'; {nearest(wanted, [term.id for term in facet.terms])}")


def labels(facet: Facet, terms: Iterable[str]) -> tuple[str, ...]:
    """Readable names of term ids."""
    return tuple(facet[term].label for term in terms)


def resolve(db: sqlite3.Connection, name: str) -> str:
    """Slug of the card called ``name``: slug or display name, in any case.

    Raises:
        QueryError: no card has this name; the nearest ones are named.
    """
    wanted = name.strip()
    slug = re.sub(r"[\s_]+", "-", wanted.lower())
    row = db.execute(
        "SELECT slug FROM method WHERE slug IN (?, ?) ORDER BY slug = ? DESC LIMIT 1", (wanted, slug, slug)
    ).fetchone()
    if row is None:  # names have no index
        query = "SELECT slug FROM method WHERE lower(name) = ? ORDER BY slug LIMIT 1"
        row = db.execute(query, (wanted.lower(),)).fetchone()
    if row is None:
        near = suggestions(db, wanted)
        hint = f"did you mean {_or(near)}?" if near else "zoo list shows them all, zoo search finds words"
        raise QueryError(f"there is no card called '{name}'; {hint}")
    return str(row[0])


def suggestions(db: sqlite3.Connection, name: str, most: int = 3) -> list[str]:
    """Slugs that look like ``name``, nearest first."""
    wanted = name.strip().lower()
    names: dict[str, str] = {}
    for slug, label in db.execute("SELECT slug, name FROM method ORDER BY slug"):
        names.setdefault(label.lower(), slug)
        names[slug] = slug
    near = get_close_matches(wanted, names, n=2 * most, cutoff=0.6)
    if len(wanted) >= 3:
        near += [label for label in names if wanted in label]
    return list(dict.fromkeys(names[label] for label in near))[:most]


def complete(db: sqlite3.Connection, start: str) -> list[tuple[str, str]]:
    """Slugs that begin with ``start``, with their names, for shell completion."""
    low = start.lower()
    query = "SELECT slug, name FROM method WHERE substr(slug, 1, ?) = ? ORDER BY slug"
    return [(slug, name) for slug, name in db.execute(query, (len(low), low))]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error: the names of ``known`` that look like ``name``, else all of them."""
    known = list(known)
    near = get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.5)
    near = near or get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.5)
    return f"did you mean {_or(near)}?" if near else f"known: {', '.join(known)}"


def _or(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)
