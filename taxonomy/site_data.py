"""Everything the site shows, read from the catalogue once: one ``SELECT`` per table, none per page.

The command line asks the catalogue one small question at a time; a site needs all of it. So this module loads the
whole catalogue into plain objects, linked to each other, which the templates only walk through.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from taxonomy import files
from taxonomy.errors import CatalogError
from taxonomy.evidence import Trial, reference_trials

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_WEB = re.compile(r"https?://[^\s<>\"']+")


@dataclass
class Term:
    """One value of a facet, with the entries that use it.

    Attributes:
        lineage: ids of the term and its ancestors, the term first.
        depth: 0 for a term without parent.
        own: entries whose card names this very term.
        entries: the same, and those of the terms below it.
    """

    facet: str
    id: str
    label: str
    definition: str
    parent: str | None
    lineage: tuple[str, ...] = ()
    children: list[Term] = field(default_factory=list, repr=False)
    own: list[Entry] = field(default_factory=list, repr=False)
    entries: list[Entry] = field(default_factory=list, repr=False)

    @property
    def depth(self) -> int:
        """Number of terms above this one."""
        return len(self.lineage) - 1

    @property
    def anchor(self) -> str:
        """Its id on the glossary page."""
        return f"{self.facet}--{self.id}"


@dataclass
class Facet:
    """One question asked of every method. ``terms`` come parents first, children right below their parent."""

    id: str
    label: str
    question: str
    view: str
    weight: float
    terms: list[Term] = field(default_factory=list, repr=False)

    @property
    def roots(self) -> list[Term]:
        """Terms without a parent."""
        return [term for term in self.terms if term.parent is None]

    @cached_property
    def entries(self) -> list[Entry]:
        """Entries that answer the question at all, in the order of the catalogue."""
        answered = {entry.slug: entry for root in self.roots for entry in root.entries}
        return sorted(answered.values(), key=Entry.order)


@dataclass(frozen=True)
class Property:
    """A yes/no statement that a test can execute."""

    id: str
    label: str
    statement: str
    contract: str


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter of an implementation; ``default`` is JSON text, ``None`` when one must be given."""

    name: str
    type: str
    default: str | None
    description: str

    @property
    def shown(self) -> str:
        """The default as one would type it."""
        value = json.loads(self.default or "null")
        return "none" if value is None else value if isinstance(value, str) else str(self.default)


@dataclass(frozen=True)
class Claim:
    """A figure its source reports."""

    model: str
    task: str
    metric: str
    budget: str | None
    value: str
    baseline: str | None
    source: str | None
    note: str | None


@dataclass(frozen=True)
class Check:
    """What tests found about one subject (a property, or a golden case), over the models they used."""

    subject: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Quantity:
    """One measured quantity, dense model and method side by side. Missing arms are ``None``."""

    name: str
    task: str
    unit: str
    repeats: int
    dense: float | None
    method: float | None
    ratio: float | None


@dataclass
class Measured:
    """One reference run of a method."""

    model: str
    parameters: str
    hardware: str
    setting: str
    started: str
    protocol: str
    environment: str
    key: str
    quantities: list[Quantity] = field(default_factory=list)


@dataclass(frozen=True)
class Environment:
    """What reference runs were measured in. ``facts`` are pairs of name and text, in the order of names."""

    digest: str
    hardware: str
    facts: tuple[tuple[str, str], ...]
    runs: int


@dataclass(frozen=True)
class Likeness:
    """Another entry and why it is alike: the terms both cards name, heaviest facets first."""

    entry: Entry
    score: float
    shared: tuple[Term, ...]


@dataclass
class Entry:
    """One card with everything that is known about it."""

    slug: str
    name: str
    title: str
    kind: str
    summary: str
    year: int
    venue: str | None
    arxiv: tuple[str, ...]
    authors: tuple[str, ...]
    shown_on: tuple[str, ...]
    code: str | None
    code_license: str | None
    bibtex: str
    implemented: bool
    basis: str
    code_commit: str | None
    weight: float
    terms: dict[str, list[Term]] = field(default_factory=dict, repr=False)
    properties: dict[str, bool] = field(default_factory=dict, repr=False)
    parameters: list[Parameter] = field(default_factory=list, repr=False)
    claims: list[Claim] = field(default_factory=list, repr=False)
    notes: dict[str, list[str]] = field(default_factory=dict, repr=False)
    related: list[Entry] = field(default_factory=list, repr=False)
    contracts: dict[str, Check] = field(default_factory=dict, repr=False)
    golden: list[Check] = field(default_factory=list, repr=False)
    measured: list[Measured] = field(default_factory=list, repr=False)
    similar: list[Likeness] = field(default_factory=list, repr=False)
    _ids: dict[str, frozenset[str]] = field(default_factory=dict, repr=False, compare=False)

    def order(self) -> tuple[str, str]:
        """Sort key: by name as people read it, then by slug."""
        return self.name.casefold(), self.slug

    def ids(self, facet: str) -> frozenset[str]:
        """Ids of the terms its card names in ``facet``."""
        if facet not in self._ids:
            self._ids[facet] = frozenset(term.id for term in self.terms.get(facet, ()))
        return self._ids[facet]

    @property
    def subtitle(self) -> str:
        """The title without the name in front of it, for listings that show both."""
        start, colon, rest = self.title.partition(": ")
        return rest if colon and start.casefold() == self.name.casefold() else self.title

    @property
    def first_sentence(self) -> str:
        """The start of the summary, for listings and page descriptions."""
        return re.split(r"(?<=[.!?]) (?=[A-Z])", self.summary, maxsplit=1)[0]


@dataclass(frozen=True)
class Paper:
    """One paper of the bibliography. ``link`` is where to read it, when a source gives a web address."""

    title: str
    link: str | None
    arxiv: str | None
    doi: str | None
    code: str | None
    venue: str | None
    year: int | None
    topics: tuple[str, ...]
    sources: tuple[str, ...]
    cards: tuple[str, ...]


@dataclass
class Library:
    """The whole catalogue in memory."""

    facets: dict[str, Facet]
    properties: dict[str, Property]
    entries: list[Entry]
    papers: list[Paper]
    digest: str
    trials: list[Trial] = field(default_factory=list, repr=False)
    environments: list[Environment] = field(default_factory=list, repr=False)
    _by_slug: dict[str, Entry] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._by_slug = {entry.slug: entry for entry in self.entries}

    def __getitem__(self, slug: str) -> Entry:
        return self._by_slug[slug]

    def __contains__(self, slug: str) -> bool:
        return slug in self._by_slug

    def having(self, name: str, value: bool) -> list[Entry]:
        """Entries whose card answers the property ``name`` with ``value``."""
        return [entry for entry in self.entries if entry.properties.get(name) is value]


def web_address(text: str | None) -> str | None:
    """``text`` when it is an http(s) address and nothing else: anything else never becomes a link."""
    return text if text is not None and _WEB.fullmatch(text) else None


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
        trials = reference_trials(connection)
        environments = _environments(connection)
        digest = connection.execute("SELECT value FROM meta WHERE key = 'sources'").fetchone()
    _attach_similar(list(entries.values()), facets)
    ordered = sorted(entries.values(), key=Entry.order)
    return Library(facets, properties, ordered, papers, digest[0] if digest else "", trials, environments)


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
    # A figure that was recalled and not read from a source is no fact: it never reaches the site.
    for row in connection.execute("SELECT * FROM claim WHERE verified ORDER BY method, position"):
        columns = ("model", "task", "metric", "budget", "value", "baseline", "source", "note")
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


def _attach_measured(connection: sqlite3.Connection, entries: Mapping[str, Entry]) -> None:
    """Finished runs of a single method; stacks belong to no one card."""
    runs: dict[int, Measured] = {}
    query = (
        "SELECT r.id, r.started, r.method, r.parameters, o.ref AS model, e.hardware, r.device, r.dtype, r.protocol,"
        " r.key, e.digest"
        " FROM run r JOIN model o ON o.id = r.model JOIN environment e ON e.id = r.environment"
        " WHERE r.status = 'done' ORDER BY r.started DESC, r.key"
    )
    for row in connection.execute(query):
        if row["method"] in entries:
            runs[row["id"]] = run = Measured(
                model=row["model"],
                parameters=_settings(json.loads(row["parameters"])),
                hardware=row["hardware"],
                setting=", ".join(part for part in (row["device"], row["dtype"]) if part),
                started=row["started"],
                protocol=row["protocol"],
                environment=row["digest"],
                key=row["key"],
            )
            entries[row["method"]].measured.append(run)
    arms: dict[tuple[int, str, str], dict[str, sqlite3.Row]] = defaultdict(dict)
    for row in connection.execute("SELECT * FROM measurement ORDER BY run, task, quantity"):
        arms[row["run"], row["task"], row["quantity"]][row["arm"]] = row
    for (number, task, name), found in arms.items():
        if number not in runs:
            continue
        of_arm = {arm: row["median"] for arm, row in found.items()}
        told = found.get("method") or found.get("dense") or found["ratio"]  # a ratio has no unit of its own
        runs[number].quantities.append(
            Quantity(
                name,
                task,
                told["unit"],
                told["n"],
                of_arm.get("dense"),
                of_arm.get("method"),
                of_arm.get("ratio"),
            )
        )


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


SIMILAR = 5
"""Most similar entries shown per card."""


def _attach_similar(entries: list[Entry], facets: Mapping[str, Facet]) -> None:
    """Find the nearest of ``entries`` (sorted by slug) for each: the weighted Jaccard index of ``queries.similar``.

    All pairs come out of one matrix product, in blocks, so that thousands of cards take a moment. Facet weights are
    multiples of 1/2, so the sums are exact and equal scores are equal to the bit; they stay in the order of slugs.
    """
    import numpy as np

    if len(entries) < 2:
        return
    columns = {
        key: index
        for index, key in enumerate((t.facet, t.id) for facet in facets.values() for t in facet.terms)
    }
    named = np.zeros((len(entries), len(columns)))
    for row, entry in enumerate(entries):
        named[row, [columns[term.facet, term.id] for terms in entry.terms.values() for term in terms]] = 1.0
    weighted = named * np.array([facets[facet].weight for facet, _ in columns])
    totals = weighted.sum(axis=1)
    keep = min(SIMILAR, len(entries) - 1)
    block = max(1, 4_000_000 // len(entries))
    for start in range(0, len(entries), block):
        shared = weighted[start : start + block] @ named.T
        union = totals[start : start + block, None] + totals - shared
        scores = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        own = np.arange(len(shared))
        scores[own, start + own] = -1.0
        least = np.partition(scores, len(entries) - keep, axis=1)[:, len(entries) - keep]
        for row, (entry, line) in enumerate(zip(entries[start : start + block], scores, strict=True)):
            found = np.flatnonzero(line >= max(least[row], 1e-9))
            nearest = found[np.argsort(-line[found], kind="stable")][:keep].tolist()
            entry.similar = [
                Likeness(entries[other], float(line[other]), _shared(entry, entries[other], facets))
                for other in nearest
            ]


def _shared(one: Entry, other: Entry, facets: Mapping[str, Facet]) -> tuple[Term, ...]:
    common = [term for facet, named in one.terms.items() for term in named if term.id in other.ids(facet)]
    return tuple(sorted(common, key=lambda term: -facets[term.facet].weight))
