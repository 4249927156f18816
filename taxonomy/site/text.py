"""Values as the templates write them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from markupsafe import Markup, escape

from taxonomy.site.library import Entry, Quantity, Term

FILTERS = ("family", "target", "where", "signal", "training", "when")
"""Facets that the table of methods can be narrowed by."""


def figure(value: float | None) -> str:
    """A number for people: four significant digits, thousands apart."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def quantity_rows(quantities: Iterable[Quantity]) -> Markup:
    """Rows of the table of a run. Put together here because a large site has a million of their cells."""
    rows = []
    for q in quantities:
        values = "".join(
            [f'<td class="value">{figure(value)}</td>' for value in (q.dense, q.method, q.ratio)]
        )
        rows.append(f"<tr>{_quantity_label(q.name, q.task, q.unit, q.repeats)}{values}</tr>")
    return Markup("\n".join(rows))  # noqa: S704 - labels are escaped, and a figure has nothing to escape


@lru_cache(maxsize=4096)
def _quantity_label(name: str, task: str, unit: str, repeats: int) -> str:
    shown = name.replace("_", " ") + (f" ({unit})" if unit not in ("", "1") else "")
    how = (f"{task}; " if task else "") + (f"median of {repeats}" if repeats > 1 else "one value")
    return f'<th scope="row">{escape(shown)}<span class="sub">{escape(how)}</span></th>'


def lowered(label: str) -> str:
    """``label`` within a sentence: its first letter small, unless it begins an abbreviation (KV, FFN) or a symbol."""
    return label[:1].lower() + label[1:] if label[1:2].islower() else label


def labels(terms: Iterable[Term]) -> list[str]:
    """What people call ``terms``."""
    return [term.label for term in terms]


def joined(texts: Iterable[str], between: str) -> str:
    """``texts`` with ``between`` in the gaps. Jinja's own filter would look into each for what is escaped already."""
    return between.join(texts)


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 method``, ``2 methods``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def arxiv_link(identifier: str) -> Markup:
    """A link to the paper ``identifier``."""
    return Markup('<a href="https://arxiv.org/abs/{0}">arXiv:{0}</a>').format(identifier)


def tokens(entry: Entry) -> str:
    """What the table of methods is filtered by: ``facet:term`` of every term and those above it, and properties."""
    terms = {
        f"{facet}:{identifier}"
        for facet in FILTERS
        for term in entry.terms.get(facet, ())
        for identifier in term.lineage
    }
    properties = {f"{name}:{'yes' if value else 'no'}" for name, value in entry.properties.items()}
    return " ".join(
        sorted({*terms, *properties, f"runs:{'yes' if entry.implemented else 'no'}", f"kind:{entry.kind}"})
    )


def shade(count: int) -> int:
    """How dark a cell of a matrix is: 0 (empty) to 5."""
    return sum(count >= least for least in (1, 2, 4, 8, 16))


def kinds(entries: Iterable[Entry]) -> list[tuple[str, int]]:
    """Kinds of card in use, with their counts."""
    order = ("method", "baseline", "benchmark", "survey", "analysis")
    counts = {kind: sum(entry.kind == kind for entry in entries) for kind in order}
    return [(kind, count) for kind, count in counts.items() if count]
