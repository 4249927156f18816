"""Questions to the built catalogue, answered for the command line and the site alike.

Every function takes an open connection (``open_catalog``) and returns what cannot be changed; ``as_json`` turns any of
them into plain values with stable keys. Only the standard library is used: no SQLAlchemy, no pydantic, no torch, so
that reading commands answer at once; for the same reason each part is imported when it is first asked for. Values
always travel as bound parameters.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taxonomy.queries.bibliography import PaperRow, TopicGap, paper_bibtex, papers, topics
    from taxonomy.queries.comparison import Comparison, ComparisonRow, compare
    from taxonomy.queries.conditions import Years, match_expression, parse_years
    from taxonomy.queries.crossings import Cell, Gaps, Matrix, gaps, matrix
    from taxonomy.queries.methods import ACTING, KINDS, MethodRow, find, list_methods, search
    from taxonomy.queries.names import (
        complete,
        find_facet,
        find_term,
        labels,
        open_catalog,
        resolve,
        suggestions,
    )
    from taxonomy.queries.page import (
        Check,
        Claim,
        Measured,
        MethodPage,
        Parameter,
        Similar,
        default_text,
        measurements,
        show,
        similar,
    )
    from taxonomy.queries.plain import as_json
    from taxonomy.queries.trees import Node, TermRow, Tree, find_view, terms, tree, views

_PARTS = {
    "bibliography": ("PaperRow", "TopicGap", "paper_bibtex", "papers", "topics"),
    "comparison": ("Comparison", "ComparisonRow", "compare"),
    "conditions": ("Years", "match_expression", "parse_years"),
    "crossings": ("Cell", "Gaps", "Matrix", "gaps", "matrix"),
    "methods": ("ACTING", "KINDS", "MethodRow", "find", "list_methods", "search"),
    "names": ("complete", "find_facet", "find_term", "labels", "open_catalog", "resolve", "suggestions"),
    "page": (
        "Check", "Claim", "Measured", "MethodPage", "Parameter", "Similar", "default_text", "measurements", "show",
        "similar",
    ),
    "plain": ("as_json",),
    "trees": ("Node", "TermRow", "Tree", "find_view", "terms", "tree", "views"),
}  # fmt: skip
_HOMES = {name: f"taxonomy.queries.{part}" for part, names in _PARTS.items() for name in names}

__all__ = [
    "ACTING", "KINDS", "Cell", "Check", "Claim", "Comparison", "ComparisonRow", "Gaps", "Matrix", "Measured",
    "MethodPage", "MethodRow", "Node", "PaperRow", "Parameter", "Similar", "TermRow", "TopicGap", "Tree", "Years",
    "as_json", "compare", "complete", "default_text", "find", "find_facet", "find_term", "find_view", "gaps", "labels",
    "list_methods", "match_expression", "matrix", "measurements", "open_catalog", "paper_bibtex", "papers",
    "parse_years", "resolve", "search", "show", "similar", "suggestions", "terms", "topics", "tree", "views",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'taxonomy.queries' has no attribute '{name}'")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
