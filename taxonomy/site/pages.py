"""Every page of the site, rendered with Jinja2 (autoescape throughout)."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from taxonomy import diagrams, finding, gallery, paths
from taxonomy.questions import Untestable
from taxonomy.site.classification import CROSSINGS, Crossing, survey_views
from taxonomy.site.downloads import downloads
from taxonomy.site.library import Check, Entry, Library, Term
from taxonomy.site.loading import load, nothing_searched
from taxonomy.site.output import File, Published, publish
from taxonomy.site.papers import CARD_SOURCE, paper_index, source_facts, years_of
from taxonomy.site.processes import usable
from taxonomy.site.results import METHODS_PER_FILE, MOST_ROWS, Results, comparison_data
from taxonomy.site.text import (
    FILTERS,
    arxiv_link,
    counted,
    figure,
    joined,
    kinds,
    labels,
    lowered,
    quantity_rows,
    shade,
    tokens,
)

Files = Iterator[File]

MANY = 1000
"""Cards from which on more than one process makes the pages."""

_METHODS_PER_PART = 250

NAVIGATION = (
    ("index.html", "Methods"),
    ("results/index.html", "Results"),
    ("compare.html", "Compare"),
    ("taxonomy/index.html", "Taxonomy"),
    ("gallery.html", "Gallery"),
    ("glossary.html", "Glossary"),
    ("bibliography.html", "Bibliography"),
    ("data.html", "Data"),
    ("about.html", "About"),
)

MOST_LISTED = 200
"""Longest list of methods below one term; the table of methods has no limit."""

EXAMPLE = "SELECT name, year FROM v_method WHERE training = 'none' AND needs_attention_maps = 0 ORDER BY year"
"""A question that the data page puts to the catalogue."""

BASES = {
    "official-code": ("Official code", "The authors' code was read, and is what the card follows in doubt."),
    "paper-text": ("Paper", "The text of the paper was read; there was no code to read, or it was not read."),
    "abstract-only": ("Abstract", "Only the abstract or second-hand descriptions were read."),
}

VERDICT_CLASSES = {
    "agrees": "verified",
    "disagrees": "failed",
    "undecided": "undecided",
    "not measured yet": "declared",
    "not testable here": "declared",
}
"""How a verdict is marked."""


def build(catalog: Path | None = None, out: Path | None = None) -> Published:
    """Render the site of ``catalog`` into the folder ``out``.

    Args:
        catalog: a built catalogue; the one that reading commands use by default.
        out: ``site/public`` of the checkout by default. An earlier site there is replaced when the new one is
            complete; anything else is left alone.

    Raises:
        CatalogError: the catalogue is missing, damaged or foreign.
        SiteError: ``out`` holds something else, or cannot be written.
    """
    catalog = catalog or paths.catalog_file()
    with nothing_searched():
        library = load(catalog)
        processes = usable() if len(library.entries) >= MANY else 1
        return publish(parts(library, catalog), out or default_folder(), processes)


def default_folder() -> Path:
    """``site/public`` in a checkout; in an installation, a folder of that name where the user stands."""
    sources = paths.templates().parent
    return sources / "public" if "_data" not in sources.parts else Path("site") / "public"


def render(library: Library, catalog: bytes | Path | None = None) -> Files:
    """All files of the site as ``(relative name, content)``, in a fixed order; see ``parts``."""
    return chain.from_iterable(parts(library, catalog))


def parts(library: Library, catalog: bytes | Path | None = None) -> list[Files]:
    """All files of the site, in parts that can be made apart from each other, the longest first.

    Args:
        library: everything to be shown.
        catalog: the catalogue itself, or its content, to be offered for download.
    """
    site, entries = _Site(library), library.entries
    slices = [entries[at : at + _METHODS_PER_PART] for at in range(0, len(entries), _METHODS_PER_PART)]
    return [
        site.result_pages(),
        site.home(),
        site.data(catalog),
        site.taxonomy(),
        *(site.methods(some) for some in slices),
        site.bibliography(),
        site.assets(),
    ]


class _Site:
    """One build: the library, the compiled templates and what pages share."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.views = survey_views(library)
        known = library.facets
        self.crossings = [Crossing(known[a], known[b]) for a, b in CROSSINGS if a in known and b in known]
        self.years = years_of(library.papers)
        self.results = Results(library)
        self._links: dict[tuple[str, str], Markup] = {}
        self.environment = Environment(
            loader=FileSystemLoader(paths.templates()),
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self.environment.filters |= {
            "figure": figure,
            "arxiv": arxiv_link,
            "lowered": lowered,
            "labels": labels,
            "join": joined,
        }
        self.environment.globals |= {
            "library": library,
            "gallery": gallery.load_gallery(),
            "results": self.results,
            "verdict_class": VERDICT_CLASSES,
            "navigation": NAVIGATION,
            "views": self.views,
            "crossings": self.crossings,
            "years": self.years,
            "kinds": kinds(library.entries),
            "basis_labels": {key: label for key, (label, _) in BASES.items()},
            "term_links": self.term_links,
            "once": self.once,
            "quantity_rows": quantity_rows,
            "strip": lambda entry: diagrams.strip(entry.ids("where"), entry.ids("target")),
            "strip_cells": diagrams.STRIP,
            "tokens": tokens,
            "shade": shade,
            "most_listed": MOST_LISTED,
            "counted": counted,
            "source_label": lambda name: "Papers of our own cards" if name == CARD_SOURCE else name,
        }
        self._templates: dict[str, Callable[..., str]] = {}
        self._rendered: dict[tuple[Any, ...], Markup] = {}
        self.environment.globals["parts"] = self.environment.get_template("parts.html").module

    def page(self, file: str, template: str, title: str, **values: Any) -> tuple[str, bytes]:
        """Render one page; ``root`` is the way back to the top, so that the site works in any folder."""
        if template not in self._templates:
            self._templates[template] = self.environment.get_template(template).render
        values.setdefault("section", _section(file))
        text = self._templates[template](file=file, root="../" * file.count("/"), title=title, **values)
        return file, text.encode()

    def home(self) -> Files:
        """The table of methods, and what is about the site itself."""
        yield self.page("index.html", "home.html", "Methods", filters=FILTERS)
        yield self.page("gallery.html", "gallery.html", "Gallery")
        yield self.page("about.html", "about.html", "About", bases=BASES)

    def data(self, catalog: bytes | Path | None) -> Files:
        """The files of the data page, the page itself, and the data that the compare page loads."""
        offered = list(downloads(self.library, catalog))
        yield from ((f"data/{item.name}", item.content) for item in offered)
        yield self.page("data.html", "data.html", "Data", downloads=offered, example=EXAMPLE)
        yield from comparison_data(self.library, self.results)

    def taxonomy(self) -> Files:
        """Trees, matrices and the glossary."""
        yield self.page("taxonomy/index.html", "taxonomy.html", "Taxonomy")
        for view in self.views:
            yield self.page(view.file, "tree.html", view.title, view=view)
        for crossing in self.crossings:
            yield self.page(crossing.file, "matrix.html", crossing.title, crossing=crossing)
        yield self.page("glossary.html", "glossary.html", "Glossary")

    def methods(self, entries: Iterable[Entry]) -> Files:
        """The pages of these cards."""
        return map(self._method, entries)

    def _method(self, entry: Entry) -> tuple[str, bytes]:
        where, target, operation, when = (
            {term.id: term.label for term in entry.terms.get(name, ())}
            for name in ("where", "target", "operation", "when")
        )
        diagram = diagrams.pipeline(
            where,
            target,
            operation,
            when,
            entry.ids("architecture"),
            name=entry.name,
            shortens=entry.properties.get("shrinks_sequence", True),
            thins_cache=entry.properties.get("shrinks_cache", False),
        )
        core = [(self.library.facets[name], terms) for name, terms in entry.terms.items()]
        return self.page(
            f"methods/{entry.slug}.html",
            "method.html",
            entry.name,
            entry=entry,
            diagram=Markup(diagram),  # noqa: S704 - taxonomy.diagrams escapes every text it draws
            with_setting=any(claim.budget for claim in entry.claims),
            with_baseline=any(claim.baseline for claim in entry.claims),
            facets=[pair for pair in core if pair[0].view == "core"],
            survey_facets=[pair for pair in core if pair[0].view != "core"],
            commands=_commands(entry),
        )

    def result_pages(self) -> Files:
        """Results by family, findings, environments, and the compare page."""
        yield self.page("results/index.html", "results.html", "Results")
        for page in self.results.families:
            yield self.page(page.file, "family.html", f"Results: {lowered(page.family.label)}", page=page)
        yield self.page("results/environments.html", "environments.html", "Environments and protocol")
        for outcome in self.results.outcomes:
            yield self.page(
                f"findings/{outcome.finding.slug}.html",
                "finding.html",
                outcome.finding.title,
                outcome=outcome,
                test=_test_facts(outcome.finding.test),
                resamples=finding.RESAMPLES,
                fewest=finding.FEWEST,
                most_rows=MOST_ROWS,
            )
        yield self.page("compare.html", "compare.html", "Compare methods", each=METHODS_PER_FILE)

    def once(self, macro: Callable[..., Markup], *values: Any) -> Markup:
        """What ``macro`` makes of ``values`` (texts, parts of the library, lists of them), rendered once."""
        key = (macro, *map(_identity, values))
        if key not in self._rendered:
            self._rendered[key] = macro(*values)
        return self._rendered[key]

    def term_links(self, terms: Iterable[Term], root: str) -> Markup:
        """Links to the glossary, separated by commas, each with the definition as its tooltip."""
        return Markup(", ").join([self._term_link(term, root) for term in terms])

    def _term_link(self, term: Term, root: str) -> Markup:
        key = (root, term.anchor)
        if key not in self._links:
            self._links[key] = Markup('<a class="term" href="{}glossary.html#{}" title="{}">{}</a>').format(
                root, term.anchor, term.definition, term.label
            )
        return self._links[key]

    def assets(self) -> Files:
        """Style sheets, scripts and the mark, as they are."""
        folder = paths.assets()
        for path in sorted(folder.iterdir()):
            yield f"assets/{path.name}", path.read_bytes()
        yield "assets/gallery.jpg", (gallery.FOLDER / "photo.jpg").read_bytes()

    def bibliography(self) -> Files:
        """The search page with its data, and a page per year for browsers without scripts and for search engines."""
        yield "data/bibliography.js", paper_index(self.library.papers)
        topics: dict[str, int] = {}
        used: dict[str, int] = {}
        for paper in self.library.papers:
            for topic in paper.topics:
                topics[topic] = topics.get(topic, 0) + 1
            for name in paper.sources:
                used[name] = used.get(name, 0) + 1
        licences = source_facts()
        sources = [
            (name, count, licences.get(name, {}))
            for name, count in sorted(used.items(), key=lambda x: x[0].lower())
        ]
        yield self.page(
            "bibliography.html",
            "bibliography.html",
            "Bibliography",
            topics=sorted(topics.items()),
            sources=sources,
        )
        for year in self.years:
            yield self.page(year.file, "year.html", f"Papers, {year.label}", year=year)


def _identity(value: Any) -> Any:
    """What tells apart the values that pages are made of: all parts of the library live as long as the build."""
    if isinstance(value, list):
        return tuple(map(id, value))
    return value if isinstance(value, str | bool | Check) else id(value)


def _section(file: str) -> str:
    """The entry of the navigation a page belongs to."""
    for start, owner in (
        ("methods/", "index.html"),
        ("results/", "results/index.html"),
        ("findings/", "results/index.html"),
        ("taxonomy/", "taxonomy/index.html"),
        ("bibliography/", "bibliography.html"),
    ):
        if file.startswith(start):
            return owner
    return file


def _test_facts(test: finding.Test) -> list[tuple[str, str]]:
    """What a finding asks of the measurements, as pairs of name and text."""
    if isinstance(test, Untestable):
        return []
    facts = [("Kind", test.kind.replace("-", " ")), ("Quantity", test.quality)]
    if test.by_budget:
        facts.append(("Budgets", f"{test.lowest:g} to {test.highest:g}"))
    if test.models:
        facts.append(("Models", ", ".join(test.models)))
    own = test.model_dump(include={"better", "than", "baseline", "task", "on"})
    return facts + [
        (name.capitalize(), value if isinstance(value, str) else ", ".join(value))
        for name, value in own.items()
    ]


def _commands(entry: Entry) -> list[tuple[str, str]]:
    """Commands that work as they stand, each with what it does."""
    if not entry.implemented:
        return []
    lines = [
        (
            f"zoo run {entry.slug}",
            "Runs it next to the unmodified model, on the default model and input of its family.",
        )
    ]
    given = next((p for p in entry.parameters if p.default not in (None, "null")), None)
    if given is not None:
        command = f"zoo run {entry.slug} --set {shlex.quote(f'{given.name}={given.shown}')}"
        lines.append((command, "Sets a parameter (this one to its default)."))
    lines.append((f"zoo show {entry.slug}", "Shows this card in the terminal."))
    return lines
