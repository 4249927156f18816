"""The trees of surveys, and facets crossed with each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from taxonomy.queries import ACTING
from taxonomy.site.library import Entry, Facet, Library, Term


@dataclass(frozen=True)
class View:
    """The tree of one survey: facets of the vocabulary that repeat its own classification."""

    slug: str
    title: str
    intro: str
    facets: tuple[Facet, ...]

    @property
    def file(self) -> str:
        """Its page."""
        return f"taxonomy/{self.slug}.html"

    @cached_property
    def entries(self) -> list[Entry]:
        """Entries that have a place in it."""
        return sorted({e.slug: e for facet in self.facets for e in facet.entries}.values(), key=Entry.order)


VIEW_TEXTS = {
    "generation-refinement-survey": (
        "Generation and refinement",
        "Decoding methods as the survey “Speculative Decoding and Beyond” sorts them: how candidate tokens are "
        "generated, how they are refined, which rule accepts them, and the shape in which they are checked.",
    ),
    "dnn-pruning-survey": (
        "Network pruning",
        "The questions of the survey of deep-network pruning by Cheng, Zhang and Shi: which hardware gains, when in "
        "the life of the network pruning happens, how the decision is made, and what pruning is combined with.",
    ),
    "uniprunebench": (
        "Placement of visual-token pruning",
        "UniPruneBench sorts visual-token pruning by where tokens leave: before the language model, between its "
        "layers, or both.",
    ),
    "effivlm-bench": (
        "Token or parameter compression",
        "EffiVLM-Bench asks whether the sequence or the network gets smaller.",
    ),
}


def survey_views(library: Library) -> list[View]:
    """One for each survey whose facets the vocabulary holds."""
    views = []
    for slug in dict.fromkeys(facet.view for facet in library.facets.values() if facet.view != "core"):
        title, intro = VIEW_TEXTS.get(slug, (library[slug].name if slug in library else slug, ""))
        views.append(View(slug, title, intro, tuple(f for f in library.facets.values() if f.view == slug)))
    return views


@dataclass(frozen=True)
class Crossing:
    """Two facets crossed over methods and baselines. A term stands for itself, without the terms below it."""

    rows: Facet
    columns: Facet

    @property
    def file(self) -> str:
        """Its page."""
        return f"taxonomy/{self.rows.id}-by-{self.columns.id}.html".replace("_", "-")

    @property
    def title(self) -> str:
        """Both facets."""
        return f"{self.rows.label} by {self.columns.label.lower()}"

    @cached_property
    def row_terms(self) -> list[Term]:
        """Terms in use."""
        return [term for term in self.rows.terms if _acting(term.own)]

    @cached_property
    def column_terms(self) -> list[Term]:
        """Terms in use."""
        return [term for term in self.columns.terms if _acting(term.own)]

    @cached_property
    def unused(self) -> list[Term]:
        """Terms of either facet that no method uses, so they have no row or column."""
        return [term for term in (*self.rows.terms, *self.columns.terms) if not _acting(term.own)]

    @cached_property
    def cells(self) -> dict[str, dict[str, list[Entry]]]:
        """Entries by row and column id."""
        return {
            row.id: {
                column.id: [entry for entry in _acting(row.own) if column.id in entry.ids(column.facet)]
                for column in self.column_terms
            }
            for row in self.row_terms
        }

    @property
    def size(self) -> int:
        """Number of cells."""
        return len(self.row_terms) * len(self.column_terms)

    @property
    def empty(self) -> int:
        """Number of cells without a method."""
        return sum(not found for line in self.cells.values() for found in line.values())


CROSSINGS = (
    ("signal", "where"),
    ("target", "training"),
    ("target", "operation"),
    ("where", "when"),
    ("signal", "family"),
    ("budget", "family"),
    ("generation", "refinement"),
    ("generation", "topology"),
    ("criterion", "pruning_time"),
    ("signal", "placement"),
)
"""Pairs of facets (rows, columns) that have a matrix page."""


def _acting(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.kind in ACTING]
