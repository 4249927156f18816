"""The whole catalogue read once: one ``SELECT`` per table, none per page.

The command line asks the catalogue one small question at a time; a site needs all of it.
"""

from __future__ import annotations

import gc
import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from taxonomy import files
from taxonomy.errors import CatalogError
from taxonomy.evidence import reference_trials
from taxonomy.queries import Claim
from taxonomy.resampling import stored_outcomes
from taxonomy.site.library import (
    Check,
    Entry,
    Environment,
    Facet,
    Library,
    Likeness,
    Measured,
    Paper,
    Parameter,
    Property,
    Quantity,
    Term,
)

MOST_RUNS = 3
"""Runs whose figures stand in full on the page of a method: the newest ones."""

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

_WEB = re.compile(r"https?://[^\s<>\"']+")


def web_address(text: str | None) -> str | None:
    """``text`` when it is an http(s) address and nothing else: anything else never becomes a link."""
    return text if text is not None and _WEB.fullmatch(text) else None


@contextmanager
def nothing_searched() -> Iterator[None]:
    """No search for garbage while a site is loaded and made: millions of objects are there that all stay.

    It finds next to nothing and takes a fifth of the time.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


def load(catalog: Path) -> Library:
    """Read the built catalogue at ``catalog``.

    Raises:
        CatalogError: it is missing, damaged, foreign or newer than this program, or a slug is not one.
    """
    with files.plain_errors(str(catalog)), closing(files.connect(catalog, immutable=True)) as connection:
        connection.row_factory = sqlite3.Row
        facets = _facets(connection)
        properties = {
            row["id"]: Property(row["id"], row["label"], row["statement"], row["contract"])
            for row in connection.execute("SELECT * FROM property ORDER BY position")
        }
        entries = _entries(connection)
        _attach_terms(connection, facets, entries)
        _attach_details(connection, entries)
        _attach_measured(connection, entries)
        papers = _papers(connection)
        trials, outcomes = reference_trials(connection), stored_outcomes(connection)
        environments = _environments(connection)
        digest = connection.execute("SELECT value FROM meta WHERE key = 'sources'").fetchone()
        _attach_similar(connection, entries, facets)
    ordered = sorted(entries.values(), key=Entry.order)
    return Library(
        facets, properties, ordered, papers, digest[0] if digest else "", trials, outcomes, environments
    )


def _facets(connection: sqlite3.Connection) -> dict[str, Facet]:
    facets = {
        row["id"]: Facet(row["id"], row["label"], row["question"], row["view"], row["weight"])
        for row in connection.execute("SELECT * FROM facet ORDER BY position")
    }
    by_id: dict[tuple[str, str], Term] = {}
    for row in connection.execute("SELECT * FROM term ORDER BY facet, position"):
        term = Term(row["facet"], row["id"], row["label"], row["definition"], row["parent"])
        by_id[term.facet, term.id] = term
    for term in by_id.values():
        if term.parent is not None:
            by_id[term.facet, term.parent].children.append(term)
    for facet in facets.values():
        roots = [term for term in by_id.values() if term.facet == facet.id and term.parent is None]
        facet.terms.extend(_depth_first(roots, ()))
    return facets


def _depth_first(terms: Iterable[Term], above: tuple[str, ...]) -> Iterator[Term]:
    for term in terms:
        term.lineage = (term.id, *above)
        yield term
        yield from _depth_first(term.children, term.lineage)


_PLAIN = (
    "name", "title", "kind", "summary", "year", "venue", "code_license", "bibtex", "basis", "code_commit",
)  # fmt: skip
"""Columns of ``method`` that are shown as they are."""


def _entries(connection: sqlite3.Connection) -> dict[str, Entry]:
    entries = {}
    for row in connection.execute("SELECT * FROM method ORDER BY slug"):
        slug = row["slug"]
        if not _SLUG.fullmatch(slug):  # a slug becomes a file name
            raise CatalogError(
                f"{slug!r} is not a slug (small letters, digits, single dashes); rebuild the catalogue"
            )
        entries[slug] = Entry(
            slug=slug,
            arxiv=tuple(json.loads(row["arxiv"])),
            authors=tuple(json.loads(row["authors"])),
            shown_on=tuple(json.loads(row["shown_on"])),
            code=web_address(row["code"]),
            implemented=bool(row["implemented"]),
            weight=row["term_weight"],
            **{name: row[name] for name in _PLAIN},
        )
    return entries


def _attach_terms(
    connection: sqlite3.Connection, facets: Mapping[str, Facet], entries: Mapping[str, Entry]
) -> None:
    terms = {(term.facet, term.id): term for facet in facets.values() for term in facet.terms}
    query = (
        "SELECT t.method, t.facet, t.term FROM method_term t JOIN facet f ON f.id = t.facet"
        " ORDER BY t.method, f.position, t.position"
    )
    for slug, facet, term_id in connection.execute(query):
        term = terms[facet, term_id]
        entries[slug].terms.setdefault(facet, []).append(term)
    for entry in sorted(entries.values(), key=Entry.order):
        for facet, named in entry.terms.items():
            reached: dict[str, Term] = {}
            for term in named:
                term.own.append(entry)
                reached.update((above, terms[facet, above]) for above in term.lineage)
            for term in reached.values():
                term.entries.append(entry)


def _attach_details(connection: sqlite3.Connection, entries: Mapping[str, Entry]) -> None:
    for slug, name, value in connection.execute("SELECT method, property, value FROM method_property"):
        entries[slug].properties[name] = bool(value)
    for row in connection.execute("SELECT * FROM parameter ORDER BY method, position"):
        default = None if row["required"] else row["default"] or "null"
        entries[row["method"]].parameters.append(
            Parameter(row["name"], row["type"], default, row["description"])
        )
    columns = [column.name for column in fields(Claim)]
    # A figure that was recalled and not read from a source is no fact: it never reaches the site.
    for row in connection.execute("SELECT * FROM claim WHERE verified ORDER BY method, position"):
        entries[row["method"]].claims.append(Claim(*(row[column] for column in columns)))
    for row in connection.execute("SELECT * FROM note ORDER BY method, kind, position"):
        entries[row["method"]].notes.setdefault(row["kind"], []).append(row["text"])
    for slug, other in connection.execute("SELECT method, other FROM related ORDER BY method, position"):
        entries[slug].related.append(entries[other])
    checks: dict[tuple[str, str, str], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    query = "SELECT * FROM verification ORDER BY method, kind, subject, model"
    for row in connection.execute(query):
        checks[row["method"], row["kind"], row["subject"]][0 if row["passed"] else 1].append(row["model"])
    for (slug, kind, subject), (passed, failed) in checks.items():
        check = Check(subject, tuple(passed), tuple(failed))
        if kind == "golden":
            entries[slug].golden.append(check)
        else:
            entries[slug].contracts[subject] = check


_SHOWN = f"""
    SELECT * FROM (
        SELECT r.*, row_number() OVER (PARTITION BY r.method ORDER BY r.started DESC, r.key) AS place,
               count(*) OVER (PARTITION BY r.method) AS runs
        FROM run r WHERE r.status = 'done' AND r.method IN (SELECT slug FROM method)
    ) WHERE place <= {MOST_RUNS}
"""
"""The newest finished runs of each single method; stacks belong to no one card."""


def _of_arms(column: str, arms: Sequence[str]) -> str:
    """SQL: ``column`` in the first of ``arms`` that is there."""
    found = [f"max(CASE arm WHEN '{arm}' THEN {column} END)" for arm in arms]
    return found[0] if len(found) == 1 else f"coalesce({', '.join(found)})"


def _attach_measured(connection: sqlite3.Connection, entries: Mapping[str, Entry]) -> None:
    runs: dict[int, Measured] = {}
    query = (
        "SELECT r.*, o.ref, e.hardware, e.digest FROM (" + _SHOWN + ") r JOIN model o ON o.id = r.model"
        " JOIN environment e ON e.id = r.environment ORDER BY r.method, r.place"
    )
    for row in connection.execute(query):
        runs[row["id"]] = run = Measured(
            model=row["ref"],
            parameters=_settings(json.loads(row["parameters"])),
            hardware=row["hardware"],
            setting=", ".join(part for part in (row["device"], row["dtype"]) if part),
            started=row["started"],
            protocol=row["protocol"],
            environment=row["digest"],
            key=row["key"],
        )
        entries[row["method"]].measured.append(run)
        entries[row["method"]].runs = row["runs"]
    told = ("method", "dense", "ratio")  # a ratio has no unit of its own
    columns = [
        _of_arms("unit", told),
        _of_arms("n", told),
        *(_of_arms("median", [arm]) for arm in ("dense", "method", "ratio")),
    ]
    query = (
        f"SELECT run, quantity, task, {', '.join(columns)} FROM measurement"
        " WHERE run IN (SELECT value FROM json_each(?)) GROUP BY run, task, quantity ORDER BY run, task, quantity"
    )
    for number, *figures in connection.execute(query, (json.dumps(list(runs)),)):
        runs[number].quantities.append(Quantity._make(figures))


def _settings(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(parameters.items()))


def _environments(connection: sqlite3.Connection) -> list[Environment]:
    query = (
        "SELECT e.digest, e.hardware, e.facts, count(r.id) FROM environment e LEFT JOIN run r ON r.environment = e.id"
        " GROUP BY e.id ORDER BY e.hardware, e.digest"
    )
    return [
        Environment(digest, hardware, tuple(_flat(json.loads(facts))), runs)
        for digest, hardware, facts, runs in connection.execute(query)
    ]


def _flat(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """``name, text`` of every fact; those of an inner object as ``outer name``. What is unknown is left out."""
    for name, value in sorted(facts.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name} ")
        elif value is not None:
            yield f"{above}{name}".replace("_", " "), value if isinstance(value, str) else json.dumps(value)


def _papers(connection: sqlite3.Connection) -> list[Paper]:
    def grouped(query: str) -> dict[int, tuple[str, ...]]:
        groups: dict[int, list[str]] = defaultdict(list)
        for paper, value in connection.execute(query):
            groups[paper].append(value)
        return {paper: tuple(values) for paper, values in groups.items()}

    topics = grouped("SELECT p.paper, t.name FROM paper_topic p JOIN topic t ON t.id = p.topic ORDER BY 1, 2")
    sources = grouped(
        "SELECT p.paper, s.name FROM paper_source p JOIN source s ON s.id = p.source ORDER BY 1, 2"
    )
    cards = grouped("SELECT paper, method FROM method_paper ORDER BY paper, method")
    papers = [
        Paper(
            title=row["title"],
            link=f"https://arxiv.org/abs/{row['arxiv']}" if row["arxiv"] else web_address(row["url"]),
            arxiv=row["arxiv"],
            doi=row["doi"],
            code=web_address(row["code"]),
            venue=row["venue"],
            year=row["year"],
            topics=topics.get(row["id"], ()),
            sources=sources.get(row["id"], ()),
            cards=cards.get(row["id"], ()),
        )
        for row in connection.execute("SELECT * FROM paper")
    ]
    papers.sort(key=lambda paper: paper.title.casefold())
    return sorted(papers, key=lambda paper: (paper.year or 0, paper.arxiv or ""), reverse=True)


def _attach_similar(
    connection: sqlite3.Connection, entries: Mapping[str, Entry], facets: Mapping[str, Facet]
) -> None:
    """The nearest entries of each, with the terms they share."""
    heaviest_first = sorted(facets.values(), key=lambda facet: -facet.weight)
    ordered = {
        slug: [term for facet in heaviest_first for term in entry.terms.get(facet.id, ())]
        for slug, entry in entries.items()
    }
    named = {slug: {term.anchor for term in terms} for slug, terms in ordered.items()}
    for slug, other, score in connection.execute(
        "SELECT method, other, score FROM similar ORDER BY method, position"
    ):
        common = tuple(term for term in ordered[slug] if term.anchor in named[other])
        entries[slug].similar.append(Likeness(entries[other], score, common))
