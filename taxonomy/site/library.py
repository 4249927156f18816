"""What the site shows, as plain objects linked to each other, which the templates only walk through."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from taxonomy.evidence import Trial
from taxonomy.queries import Claim
from taxonomy.resampling import Outcomes


@dataclass
class Term:
    """One value of a facet, with the entries that use it.

    Attributes:
        anchor: its id on the glossary page.
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
    anchor: str = ""
    lineage: tuple[str, ...] = ()
    children: list[Term] = field(default_factory=list, repr=False)
    own: list[Entry] = field(default_factory=list, repr=False)
    entries: list[Entry] = field(default_factory=list, repr=False)

    @property
    def depth(self) -> int:
        """Number of terms above this one."""
        return len(self.lineage) - 1

    def __post_init__(self) -> None:
        self.anchor = f"{self.facet}--{self.id}"


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
class Check:
    """What tests found about one subject (a property, or a golden case), over the models they used."""

    subject: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]


class Quantity(NamedTuple):
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
    """One card with everything that is known about it; of its ``runs`` reference runs the newest are ``measured``."""

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
    runs: int = 0
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
    outcomes: Outcomes = field(default_factory=dict, repr=False)
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
