"""Questions to the built catalogue, answered for the command line and the site alike.

Every function takes an open connection (``open_catalog``) and returns frozen dataclasses; ``as_json`` turns any of
them into plain values with stable keys. Only the standard library is used: no SQLAlchemy, no pydantic, no torch, so
that reading commands answer at once. Values always travel as bound parameters.
"""

from __future__ import annotations

import json
import re
import sqlite3
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from taxonomy import files, paths
from taxonomy.errors import CatalogError, QueryError
from taxonomy.vocabulary import FACETS, PROPERTIES, Facet

KINDS = ("method", "baseline", "benchmark", "survey", "analysis")
ACTING = ("method", "baseline")
"""Kinds of card that change how a model runs: what ``zoo list`` shows by default."""

Years = tuple[int | None, int | None]
"""First and last year, both included; ``None`` = open."""


# --- results --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A method in a list. ``facets`` holds term ids by facet, ``properties`` yes or no by property."""

    slug: str
    name: str
    year: int
    kind: str
    family: str
    implemented: bool
    summary: str
    facets: Mapping[str, tuple[str, ...]]
    properties: Mapping[str, bool]


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter of the implementation."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


@dataclass(frozen=True)
class Claim:
    """A figure that a source reports, as reported."""

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
    """A golden case, or an executed property or facet (``kind``). ``model`` is empty for golden cases."""

    kind: str
    subject: str
    model: str
    passed: bool
    version: str | None
    detail: str | None


@dataclass(frozen=True)
class Measured:
    """A reference measurement. Medians; ``ratio`` is method over dense where the run stored it."""

    method: str
    model: str
    hardware: str
    started: str
    task: str
    quantity: str
    unit: str
    arm: str
    median: float
    spread: float | None
    n: int


@dataclass(frozen=True)
class PaperRow:
    """A paper of the bibliography. ``cards`` are the slugs of the cards that belong to it."""

    title: str
    arxiv: str | None
    doi: str | None
    url: str | None
    venue: str | None
    year: int | None
    code: str | None
    topics: tuple[str, ...]
    cards: tuple[str, ...]


@dataclass(frozen=True)
class Similar:
    """Another method, with the weighted share of facet terms the two have in common, in ``(0, 1]``."""

    slug: str
    name: str
    score: float
    implemented: bool


@dataclass(frozen=True)
class MethodPage:
    """Everything the catalogue knows about one method.

    ``unverified_claims`` were recalled, not read: whoever shows them must say so. ``notes`` are by kind: ``note``,
    ``paper_vs_code``, ``deviation``, ``reconstructed``.
    """

    slug: str
    name: str
    title: str
    kind: str
    summary: str
    year: int
    venue: str | None
    family: str
    implemented: bool
    authors: tuple[str, ...]
    arxiv: tuple[str, ...]
    code: str | None
    code_license: str | None
    code_commit: str | None
    basis: str
    shown_on: tuple[str, ...]
    facets: dict[str, tuple[str, ...]]
    properties: dict[str, bool]
    parameters: tuple[Parameter, ...]
    claims: tuple[Claim, ...]
    unverified_claims: tuple[Claim, ...]
    measurements: tuple[Measured, ...]
    checks: tuple[Check, ...]
    notes: dict[str, tuple[str, ...]]
    related: tuple[str, ...]
    similar: tuple[Similar, ...]
    papers: tuple[PaperRow, ...]
    bibtex: str


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
class TopicGap:
    """A topic of the bibliography, and how much of it the zoo covers."""

    topic: str
    papers: int
    cards: int
    implemented: int


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


@dataclass(frozen=True)
class TermRow:
    """A glossary entry; ``count`` are the cards that use the term itself."""

    facet: str
    id: str
    label: str
    definition: str
    parent: str | None
    count: int


def as_json(value: Any) -> Any:
    """Dataclasses, tuples and dictionaries as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


# --- names and values that users write ------------------------------------------------------------------------


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
        raise QueryError(f"there is no facet '{name}'; {_nearest(name, FACETS)}")
    return found


def find_term(facet: Facet, name: str) -> str:
    """Id of the term called ``name`` (id or label); raises ``QueryError`` with the nearest ids."""
    wanted = name.strip().lower().replace("_", "-")
    for term in facet.terms:
        if wanted in (term.id, term.label.lower()):
            return term.id
    raise QueryError(
        f"{facet.id} has no term '{name}'; {_nearest(wanted, [term.id for term in facet.terms])}"
    )


def parse_years(text: str) -> Years:
    """``2024``, ``2023..2025``, ``2024..`` or ``..2022``, both ends included.

    Raises:
        QueryError: the text is none of these, or runs backwards.
    """
    match = re.fullmatch(r"\s*(\d{4})?\s*(\.\.)?\s*(\d{4})?\s*", text)
    if not match or not (match[1] or match[3]) or (match[1] and match[3] and not match[2]):
        raise QueryError(
            f"'{text}' is not a year or a range of years; write 2024, 2023..2025, 2024.. or ..2022"
        )
    first, last = (int(year) if year else None for year in (match[1], match[3]))
    if not match[2]:
        return first, first
    if first and last and first > last:
        raise QueryError(f"'{text}' runs backwards; write {last}..{first}")
    return first, last


def match_expression(words: str) -> str | None:
    """What a user typed as an FTS5 expression: all words must occur, the last one may be the beginning of a word.

    ``"..."`` keeps a phrase together; everything else that FTS5 would read as syntax is plain text. ``None`` when
    there is no letter or digit to look for.
    """
    parts: list[str] = []
    for phrase, word in re.findall(r'"([^"]*)"|([^\s"]+)', words):
        # The tokenizer splits at everything but letters and digits; "top-k" must stay a phrase, not become two words.
        tokens = re.findall(r"\w+", (phrase or word).replace("_", " "))
        if tokens:
            parts.append('"' + " ".join(tokens) + '"')
    if not parts:
        return None
    if not words.rstrip().endswith('"'):
        parts[-1] += " *"
    return " AND ".join(parts)


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


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.5)
    near = near or get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.5)
    return f"did you mean {_or(near)}?" if near else f"known: {', '.join(known)}"


def _or(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)


# --- lists of methods -----------------------------------------------------------------------------------------


class _Conditions:
    """SQL conditions on ``method m`` with their bound values."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.values: list[Any] = []

    def add(self, text: str, *values: Any) -> None:
        self.texts.append(text)
        self.values += values

    def years(self, column: str, years: Years | None) -> None:
        for sign, year in zip((">=", "<="), years or (None, None), strict=True):
            if year is not None:
                self.add(f"{column} {sign} ?", year)

    @property
    def where(self) -> str:
        return " WHERE " + " AND ".join(self.texts) if self.texts else ""


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def _below(facet: Facet, terms: Iterable[str]) -> list[str]:
    """``terms`` and everything below them, in the order of the vocabulary."""
    chosen: set[str] = set(terms)
    for term in facet.terms:  # parents stand before their children
        if term.parent in chosen:
            chosen.add(term.id)
    return [term.id for term in facet.terms if term.id in chosen]


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
    wanted = _Conditions()
    for facet_name, groups in (include or {}).items():
        facet = find_facet(facet_name)
        for group in groups:
            terms = _below(facet, [find_term(facet, term) for term in group])
            wanted.add(
                f"m.slug IN (SELECT method FROM method_term WHERE facet = ? AND term IN ({_marks(terms)}))",
                facet.id,
                *terms,
            )
    for facet_name, names in (exclude or {}).items():
        facet = find_facet(facet_name)
        terms = _below(facet, [find_term(facet, term) for term in names])
        wanted.add(
            f"m.slug NOT IN (SELECT method FROM method_term WHERE facet = ? AND term IN ({_marks(terms)}))",
            facet.id,
            *terms,
        )
    for prop, value in (properties or {}).items():
        wanted.add(
            "EXISTS (SELECT 1 FROM method_property p WHERE p.method = m.slug AND p.property = ? AND p.value = ?)",
            _property(prop),
            int(value),
        )
    if implemented is not None:
        wanted.add("m.implemented = ?", int(implemented))
    if name:
        wanted.add("(instr(m.slug, ?) OR instr(lower(m.name), ?))", name.lower(), name.lower())
    wanted.years("m.year", years)
    wanted.add(f"m.kind IN ({_marks(kinds)})", *(_kind(kind) for kind in kinds))
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
    return [
        MethodRow(
            slug, name, year, kind, family, bool(runs), summary, _Facets(facets), _Properties(properties)
        )
        for slug, name, year, kind, family, runs, summary, facets, properties in db.execute(
            f"SELECT {columns} FROM method m{tail}", values
        )
    ]


class _Parsed(Mapping[str, Any]):
    """A JSON object that is parsed when somebody looks into it: most rows of a long list are only counted or named."""

    __slots__ = ("_parsed", "_text")

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def _values(self) -> dict[str, Any]:
        try:
            return self._parsed
        except AttributeError:
            self._parsed: dict[str, Any] = self._in_order(json.loads(self._text))
            return self._parsed

    @staticmethod
    @abstractmethod
    def _in_order(values: dict[str, Any]) -> dict[str, Any]:
        """The values with their keys in the order in which people read them."""

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


class _Facets(_Parsed):
    """Terms by facet, in the order of the vocabulary."""

    __slots__ = ()

    @staticmethod
    def _in_order(values: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(values[name]) for name in FACETS if name in values}


class _Properties(_Parsed):
    """Yes or no by property, in the order of the vocabulary."""

    __slots__ = ()

    @staticmethod
    def _in_order(values: dict[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in PROPERTIES if name in values}


def _property(name: str) -> str:
    found = name.replace("-", "_")
    if found not in PROPERTIES:
        raise QueryError(f"there is no property '{name}'; {_nearest(found, PROPERTIES)}")
    return found


def _kind(name: str) -> str:
    if name not in KINDS:
        raise QueryError(f"there is no kind of card '{name}'; known: {', '.join(KINDS)}")
    return name


# --- one method, or a few -------------------------------------------------------------------------------------


def show(db: sqlite3.Connection, name: str) -> MethodPage:
    """Everything about one method; raises ``QueryError`` with the nearest names when there is none."""
    slug = resolve(db, name)
    cursor = db.execute("SELECT * FROM method WHERE slug = ?", (slug,))
    row = dict(zip((column[0] for column in cursor.description), cursor.fetchone(), strict=True))
    lists: dict[str, Any] = {key: tuple(json.loads(row[key])) for key in ("authors", "arxiv", "shown_on")}
    plain = (
        "name",
        "title",
        "kind",
        "summary",
        "year",
        "venue",
        "family",
        "code",
        "code_license",
        "code_commit",
    )
    notes: dict[str, list[str]] = {"note": [], "paper_vs_code": [], "deviation": [], "reconstructed": []}
    for kind, text in db.execute(
        "SELECT kind, text FROM note WHERE method = ? ORDER BY kind, position", (slug,)
    ):
        notes[kind].append(text)
    related = db.execute("SELECT other FROM related WHERE method = ? ORDER BY position", (slug,))
    return MethodPage(
        slug=slug,
        implemented=bool(row["implemented"]),
        basis=row["basis"],
        bibtex=row["bibtex"],
        facets=dict(_Facets(row["facets"])),
        properties=dict(_Properties(row["properties"])),
        parameters=_parameters(db, slug),
        claims=_claims(db, slug, verified=True),
        unverified_claims=_claims(db, slug, verified=False),
        measurements=measurements(db, slug),
        checks=_checks(db, slug),
        notes={kind: tuple(texts) for kind, texts in notes.items()},
        related=tuple(other for (other,) in related),
        similar=tuple(similar(db, slug)),
        papers=tuple(
            _papers(db, "JOIN method_paper l ON l.paper = p.id WHERE l.method = ? ORDER BY p.id", [slug])
        ),
        **lists,
        **{name: row[name] for name in plain},
    )


def _parameters(db: sqlite3.Connection, slug: str) -> tuple[Parameter, ...]:
    query = 'SELECT name, type, "default", required, description FROM parameter WHERE method = ? ORDER BY position'
    return tuple(
        Parameter(name, kind, None if default is None else json.loads(default), bool(required), description)
        for name, kind, default, required, description in db.execute(query, (slug,))
    )


def _claims(db: sqlite3.Connection, slug: str, *, verified: bool) -> tuple[Claim, ...]:
    columns = ", ".join(field.name for field in fields(Claim))
    query = f"SELECT {columns} FROM claim WHERE method = ? AND verified = ? ORDER BY position"
    return tuple(Claim(*row) for row in db.execute(query, (slug, int(verified))))


def _checks(db: sqlite3.Connection, slug: str) -> tuple[Check, ...]:
    query = (
        "SELECT kind, subject, model, passed, version, detail FROM verification WHERE method = ?"
        " ORDER BY kind, subject, model"
    )
    return tuple(
        Check(kind, subject, model, bool(passed), version, detail)
        for kind, subject, model, passed, version, detail in db.execute(query, (slug,))
    )


def measurements(
    db: sqlite3.Connection, slug: str, *, quantity: str | None = None, limit: int = 500
) -> tuple[Measured, ...]:
    """Reference measurements of a method (stacks that hold it included), newest first."""
    wanted = _Conditions()
    wanted.add("s.slug = ?", slug)
    wanted.add("r.status = 'done'")
    if quantity:
        wanted.add("x.quantity = ?", quantity)
    query = (
        "SELECT r.method, o.ref, e.hardware, r.started, x.task, x.quantity, x.unit, x.arm, x.median, x.spread, x.n"
        " FROM run_method s JOIN run r ON r.id = s.run JOIN measurement x ON x.run = r.id"
        " JOIN model o ON o.id = r.model JOIN environment e ON e.id = r.environment"
        f"{wanted.where} ORDER BY r.started DESC, r.key, x.task, x.quantity, x.arm LIMIT ?"
    )
    return tuple(Measured(*row) for row in db.execute(query, (*wanted.values, limit)))


def similar(db: sqlite3.Connection, slug: str, most: int = 5) -> list[Similar]:
    """Methods with the most alike facets (the weighted Jaccard index over terms, ties by slug); 5 are known."""
    query = """
        SELECT m.slug, m.name, s.score, m.implemented FROM similar s JOIN method m ON m.slug = s.other
        WHERE s.method = ? ORDER BY s.position LIMIT ?
    """
    return [
        Similar(other, name, round(score, 4), bool(implemented))
        for other, name, score, implemented in db.execute(query, (slug, most))
    ]


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


def labels(facet: Facet, terms: Iterable[str]) -> tuple[str, ...]:
    """Readable names of term ids."""
    return tuple(facet[term].label for term in terms)


def default_text(parameter: Parameter) -> str:
    """A default value as a user would write it; ``required`` when there is none."""
    if parameter.required:
        return "required"
    default = parameter.default
    return default if isinstance(default, str) else json.dumps(default)


# --- bibliography ---------------------------------------------------------------------------------------------


def papers(
    db: sqlite3.Connection,
    words: str | None = None,
    *,
    topic: str | None = None,
    years: Years | None = None,
    source: str | None = None,
    code: bool | None = None,
    carded: bool | None = None,
    limit: int | None = 25,
) -> list[PaperRow]:
    """Papers of the bibliography: best match first when there are ``words``, else newest first.

    Args:
        db: connection from ``open_catalog``.
        words: must all occur in title, venue or topics.
        topic: one of ``topics()``.
        years: first and last year.
        source: owner/name of a list that carries the paper.
        code: with, or without, a link to code.
        carded: with, or without, a card of the zoo.
        limit: at most so many; ``None`` = all.

    Raises:
        QueryError: unknown topic or source, or words without a letter or digit.
    """
    wanted, join, order = _Conditions(), "", "p.year IS NULL, p.year DESC, p.arxiv DESC, p.id"
    values: list[Any] = []
    if words:
        expression = match_expression(words)
        if expression is None:
            raise QueryError("papers needs a word with a letter or digit")
        join = " JOIN (SELECT rowid AS hit, bm25(paper_fts, 5, 1, 2) AS badness FROM paper_fts"
        join += " WHERE paper_fts MATCH ?) ON hit = p.id"
        order = "badness, " + order
        values.append(expression)
    for name, table in ((topic, "topic"), (source, "source")):
        if name is not None:
            known = [row[0] for row in db.execute(f"SELECT name FROM {table} ORDER BY id")]
            if name not in known:
                raise QueryError(f"there is no {table} '{name}'; {_nearest(name, known)}")
            wanted.add(
                f"p.id IN (SELECT l.paper FROM paper_{table} l JOIN {table} n ON n.id = l.{table} WHERE n.name = ?)",
                name,
            )
    wanted.years("p.year", years)
    if code is not None:
        wanted.add(f"p.code IS {'NOT ' if code else ''}NULL")
    if carded is not None:
        wanted.add(f"p.id {'IN' if carded else 'NOT IN'} (SELECT paper FROM method_paper)")
    tail = f"{join}{wanted.where} ORDER BY {order} LIMIT ?"
    return _papers(db, tail, [*values, *wanted.values, -1 if limit is None else limit])


def _papers(db: sqlite3.Connection, tail: str, values: Sequence[Any]) -> list[PaperRow]:
    chosen = f"SELECT p.* FROM paper p {tail}"
    rows = db.execute(chosen, values).fetchall()
    ids = [row[0] for row in rows]
    topics: dict[int, list[str]] = {number: [] for number in ids}
    cards: dict[int, list[str]] = {number: [] for number in ids}
    for start in range(0, len(ids), 500):  # SQLite limits the number of bound values
        part = ids[start : start + 500]
        query = f"""SELECT t.paper, o.name FROM paper_topic t JOIN topic o ON o.id = t.topic
            WHERE t.paper IN ({_marks(part)}) ORDER BY o.id"""
        for number, topic in db.execute(query, part):
            topics[number].append(topic)
        query = f"SELECT paper, method FROM method_paper WHERE paper IN ({_marks(part)}) ORDER BY method"
        for number, card in db.execute(query, part):
            cards[number].append(card)
    return [
        PaperRow(title, arxiv, doi, url, venue, year, code, tuple(topics[number]), tuple(cards[number]))
        for number, title, arxiv, doi, url, venue, year, code in rows
    ]


_BIBTEX_SPECIAL = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_BIBTEX_SPECIAL["\\"] = r"\textbackslash{}"


def paper_bibtex(paper: PaperRow) -> str:
    """A BibTeX entry of what is known about a paper; the key is its arXiv id, else its title."""
    words = re.findall(r"[a-z0-9]+", paper.title.lower())
    key = f"arxiv{paper.arxiv.replace('.', '')}" if paper.arxiv else "".join(words)  # titles are unique
    rows = [("title", "{" + "".join(_BIBTEX_SPECIAL.get(letter, letter) for letter in paper.title) + "}")]
    if paper.year:
        rows.append(("year", str(paper.year)))
    if paper.arxiv:
        rows += [("eprint", paper.arxiv), ("archivePrefix", "arXiv")]
    if paper.venue and paper.venue != "arXiv":
        rows.append(("note", paper.venue))
    if paper.doi:
        rows.append(("doi", paper.doi))
    if paper.url:
        rows.append(("url", paper.url))
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in rows)
    return f"@misc{{{key},\n{body}\n}}"


def topics(db: sqlite3.Connection) -> list[TopicGap]:
    """All topics of the bibliography, with how many of their papers have a card, and how many methods run."""
    query = """
        SELECT o.name, u.papers, u.cards, u.implemented FROM topic o JOIN topic_use u ON u.topic = o.id ORDER BY o.id
    """
    return [TopicGap(*row) for row in db.execute(query)]


# --- the taxonomy ---------------------------------------------------------------------------------------------


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
    query = f"SELECT facet, term, cards, implemented, methods FROM term_use WHERE facet IN ({_marks(chosen)})"
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


def matrix(db: sqlite3.Connection, rows: str = "where", columns: str = "signal") -> Matrix:
    """Cross two facets over methods and baselines; every pair of terms that are used at all has a cell.

    Raises:
        QueryError: unknown facet, or the same facet twice.
    """
    across, down = find_facet(columns), find_facet(rows)
    if across.id == down.id:
        raise QueryError(f"a matrix needs two different facets, not '{rows}' twice")
    acting = dict(
        db.execute(f"SELECT slug, implemented FROM method WHERE kind IN ({_marks(ACTING)})", ACTING)
    )
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
