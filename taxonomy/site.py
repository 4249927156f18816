"""The static site, rendered from the catalogue: plain files that work from a folder, a server or an archive.

``build`` loads the catalogue once (``taxonomy.site_data``), renders every page with Jinja2 (autoescape throughout)
and hands the files to ``taxonomy.site_output``. Nothing depends on the clock or the machine, so the same catalogue
gives the same bytes. No page asks anything of another server.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from taxonomy import diagrams, finding, gallery, paths
from taxonomy.queries import ACTING
from taxonomy.site_data import Claim, Entry, Facet, Library, Paper, Quantity, Term, load
from taxonomy.site_output import Published, SiteError, publish
from taxonomy.site_results import MOST_ROWS, Results, comparison_data

__all__ = ["Published", "SiteError", "build", "render"]

Files = Iterator[tuple[str, bytes]]

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

FILTERS = ("family", "target", "where", "signal", "training", "when")
"""Facets that the table of methods can be narrowed by."""

MOST_LISTED = 200
"""Longest list of methods below one term; the table of methods has no limit."""

FIRST_YEAR_ALONE = 2015
"""Papers before this year share a page."""

CARD_SOURCE = "efficiency-zoo"
"""The name under which the bibliography keeps papers that were added for a card and stand in no list."""

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
}
"""How a verdict is marked."""


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


def _acting(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.kind in ACTING]


@dataclass(frozen=True)
class Download:
    """A file of the data page."""

    name: str
    content: bytes = field(repr=False)
    what: str
    how: str

    @property
    def size(self) -> str:
        """Its length for people, in decimal units."""
        length = len(self.content)
        return f"{length / 1e6:.1f} MB" if length >= 1_000_000 else f"{max(1, round(length / 1e3))} kB"


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
    return publish(render(load(catalog), catalog.read_bytes()), out or default_folder())


def default_folder() -> Path:
    """``site/public`` in a checkout; in an installation, a folder of that name where the user stands."""
    sources = paths.templates().parent
    return sources / "public" if "_data" not in sources.parts else Path("site") / "public"


def render(library: Library, catalog: bytes | None = None) -> Files:
    """All files of the site as ``(relative name, content)``, in a fixed order.

    Args:
        library: everything to be shown.
        catalog: the catalogue itself, to be offered for download.
    """
    site = _Site(library)
    yield from site.assets()
    downloads = list(site.downloads(catalog))
    yield from ((f"data/{item.name}", item.content) for item in downloads)
    yield "data/bibliography.js", site.paper_index()
    yield site.page("index.html", "home.html", "Methods", filters=FILTERS)
    for entry in library.entries:
        yield site.method(entry)
    yield from site.result_pages()
    yield site.page("taxonomy/index.html", "taxonomy.html", "Taxonomy")
    for view in site.views:
        yield site.page(view.file, "tree.html", view.title, view=view)
    for crossing in site.crossings:
        yield site.page(crossing.file, "matrix.html", crossing.title, crossing=crossing)
    yield site.page("gallery.html", "gallery.html", "Gallery")
    yield site.page("glossary.html", "glossary.html", "Glossary")
    yield from site.bibliography()
    yield site.page("data.html", "data.html", "Data", downloads=downloads, example=EXAMPLE)
    yield site.page("about.html", "about.html", "About", bases=BASES)


class _Site:
    """One build: the library, the compiled templates and what pages share."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.views = _views(library)
        known = library.facets
        self.crossings = [Crossing(known[a], known[b]) for a, b in CROSSINGS if a in known and b in known]
        self.years = _years(library.papers)
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
        self.environment.filters |= {"figure": figure, "arxiv": _arxiv_link, "lowered": lowered}
        self.environment.globals |= {
            "library": library,
            "gallery": gallery.load_gallery(),
            "results": self.results,
            "verdict_class": VERDICT_CLASSES,
            "navigation": NAVIGATION,
            "views": self.views,
            "crossings": self.crossings,
            "years": self.years,
            "kinds": _kinds(library.entries),
            "basis_labels": {key: label for key, (label, _) in BASES.items()},
            "term_links": self.term_links,
            "once": self.once,
            "quantity_rows": quantity_rows,
            "strip": lambda entry: diagrams.strip(entry.ids("where"), entry.ids("target")),
            "strip_cells": diagrams.STRIP,
            "tokens": _tokens,
            "shade": _shade,
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

    def method(self, entry: Entry) -> tuple[str, bytes]:
        """The page of one card."""
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
            facets=[pair for pair in core if pair[0].view == "core"],
            survey_facets=[pair for pair in core if pair[0].view != "core"],
            commands=_commands(entry),
        )

    def result_pages(self) -> Files:
        """Results by family, findings, environments, and the compare page with the data it loads."""
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
        yield self.page("compare.html", "compare.html", "Compare methods")
        for entry in self.library.entries:
            yield (
                f"data/methods/{entry.slug}.js",
                comparison_data(self.library, entry, self.results.points(entry)),
            )

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

    def downloads(self, catalog: bytes | None) -> Iterator[Download]:
        """The files of the data page."""
        entries, papers = self.library.entries, self.library.papers
        if catalog is not None:
            yield Download(
                "catalog.sqlite",
                catalog,
                "The whole catalogue: cards, vocabulary, bibliography, measurements, test results.",
                "Open it with sqlite3, Datasette or pandas; the views whose names begin with v_ are flat. Figures "
                "marked verified = 0 were recalled rather than read, and are not facts.",
            )
        yield Download(
            "methods.json",
            _json(map(_as_data, entries)),
            "All cards with facets, properties, parameters, reported figures, fidelity notes and references.",
            "One object per card, in the order of names.",
        )
        yield Download(
            "methods.csv",
            _csv(*_method_table(self.library)),
            "One line per card: identity, facets and properties.",
            "Several terms in one cell are separated by semicolons; an empty property does not apply.",
        )
        yield Download(
            "vocabulary.json",
            json.dumps(_vocabulary(self.library), ensure_ascii=False, indent=1).encode() + b"\n",
            "Facets, terms and properties with their definitions.",
            "Terms name their parent where they have one.",
        )
        yield Download(
            "cards.bib",
            "\n\n".join(entry.bibtex for entry in entries).encode() + b"\n",
            "BibTeX entries of all cards.",
            "Keys are the slug without dashes, followed by the year.",
        )
        yield Download(
            "papers.json",
            _json(map(_paper_data, papers)),
            "The bibliography, newest first, each paper with topics and the lists that carry it.",
            "cards holds the slugs of the cards that belong to a paper.",
        )
        yield Download(
            "papers.csv",
            _csv(
                ["title", "year", "venue", "arxiv", "doi", "link", "code", "topics", "sources", "cards"],
                [
                    [getattr(p, name) for name in ("title", "year", "venue", "arxiv", "doi", "link", "code")]
                    + [";".join(values) for values in (p.topics, p.sources, p.cards)]
                    for p in papers
                ],
            ),
            "The same as a table.",
            "Lists in one cell are separated by semicolons.",
        )  # fmt: skip

    def paper_index(self) -> bytes:
        """The bibliography as a script: unlike JSON, a page that was opened from a folder may load it.

        Topics and venues are written once and numbered; a missing value is 0.
        """
        topics = sorted({topic for paper in self.library.papers for topic in paper.topics})
        venues = sorted({paper.venue for paper in self.library.papers if paper.venue})
        topic_at = {topic: index for index, topic in enumerate(topics)}
        venue_at = {venue: index for index, venue in enumerate(venues, 1)}
        rows = [
            [
                paper.title,
                paper.year or 0,
                venue_at.get(paper.venue or "", 0),
                paper.link or 0,
                paper.code or 0,
                [topic_at[topic] for topic in paper.topics],
                list(paper.cards),
            ]
            for paper in self.library.papers
        ]
        content = {"topics": topics, "venues": ["", *venues], "rows": rows}
        return (
            f"window.zooPapers={json.dumps(content, ensure_ascii=False, separators=(',', ':'))};\n".encode()
        )

    def bibliography(self) -> Files:
        """The search page, and one plain page per year for browsers without scripts and for search engines."""
        topics: dict[str, int] = {}
        used: dict[str, int] = {}
        for paper in self.library.papers:
            for topic in paper.topics:
                topics[topic] = topics.get(topic, 0) + 1
            for name in paper.sources:
                used[name] = used.get(name, 0) + 1
        licences = _source_facts()
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


# --- values for templates -------------------------------------------------------------------------------------


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


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 method``, ``2 methods``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _arxiv_link(identifier: str) -> Markup:
    return Markup('<a href="https://arxiv.org/abs/{0}">arXiv:{0}</a>').format(identifier)


def _tokens(entry: Entry) -> str:
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


def _shade(count: int) -> int:
    """How dark a cell of a matrix is: 0 (empty) to 5."""
    return sum(count >= least for least in (1, 2, 4, 8, 16))


def _identity(value: Any) -> Any:
    """What tells apart the values that pages are made of: all parts of the library live as long as the build."""
    if isinstance(value, list):
        return tuple(map(id, value))
    return value if isinstance(value, str | bool) else id(value)


def _kinds(entries: Iterable[Entry]) -> list[tuple[str, int]]:
    order = ("method", "baseline", "benchmark", "survey", "analysis")
    counts = {kind: sum(entry.kind == kind for entry in entries) for kind in order}
    return [(kind, count) for kind, count in counts.items() if count]


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
    budgets = f"{test.lowest:g} to {test.highest:g}"
    facts = [("Kind", test.kind.replace("-", " ")), ("Quality", test.quality), ("Budgets", budgets)]
    if test.models:
        facts.append(("Models", ", ".join(test.models)))
    own = test.model_dump(include={"better", "than", "baseline", "task"})
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


# --- views and years ------------------------------------------------------------------------------------------


def _views(library: Library) -> list[View]:
    views = []
    for slug in dict.fromkeys(facet.view for facet in library.facets.values() if facet.view != "core"):
        title, intro = VIEW_TEXTS.get(slug, (library[slug].name if slug in library else slug, ""))
        views.append(View(slug, title, intro, tuple(f for f in library.facets.values() if f.view == slug)))
    return views


@dataclass(frozen=True)
class Year:
    """A page of the bibliography."""

    label: str
    name: str
    papers: tuple[Paper, ...]

    @property
    def file(self) -> str:
        """Its page."""
        return f"bibliography/{self.name}.html"


def _years(papers: Sequence[Paper]) -> list[Year]:
    def group(paper: Paper) -> tuple[str, str]:
        if paper.year is None:
            return "undated", "undated"
        if paper.year < FIRST_YEAR_ALONE:
            return f"before {FIRST_YEAR_ALONE}", f"before-{FIRST_YEAR_ALONE}"
        return str(paper.year), str(paper.year)

    return [
        Year(label, name, tuple(sorted(found, key=lambda paper: paper.title.casefold())))
        for (label, name), found in groupby(papers, key=group)
    ]


def _source_facts() -> dict[str, dict[str, str]]:
    """Licence, commit and date of each list that the bibliography was drawn from, by ``owner/name``."""
    path = paths.PACKAGE / "bibliography_sources.jsonl"
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row["name"]: row for row in rows}


# --- data files -----------------------------------------------------------------------------------------------


def _json(rows: Iterable[Any]) -> bytes:
    """A list, one element per line."""
    return ("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n").encode()


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # RFC 4180
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _method_table(library: Library) -> tuple[list[str], list[list[Any]]]:
    own = [
        "slug",
        "name",
        "title",
        "kind",
        "year",
        "venue",
        "arxiv",
        "code",
        "code_license",
        "basis",
        "implemented",
    ]
    rows: list[list[Any]] = []
    for entry in library.entries:
        plain = {name: getattr(entry, name) for name in own} | {
            "arxiv": ";".join(entry.arxiv),
            "implemented": _yes(entry.implemented),
        }
        facets = [";".join(term.id for term in entry.terms.get(name, ())) for name in library.facets]
        properties = [
            _yes(entry.properties[name]) if name in entry.properties else "" for name in library.properties
        ]
        rows.append([*plain.values(), *facets, *properties])
    return [*own, *library.facets, *library.properties], rows


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _as_data(entry: Entry) -> dict[str, Any]:
    plain = ("slug", "name", "title", "kind", "summary", "year", "venue", "arxiv", "authors", "shown_on", "code",
             "code_license", "implemented", "properties", "notes")  # fmt: skip
    return {
        **{name: getattr(entry, name) for name in plain},
        "fidelity": {"basis": entry.basis, "commit": entry.code_commit},
        "facets": {name: [term.id for term in terms] for name, terms in entry.terms.items()},
        "parameters": [
            {"name": p.name, "type": p.type, "description": p.description, "required": p.default is None}
            | ({} if p.default is None else {"default": json.loads(p.default)})
            for p in entry.parameters
        ],
        "reported": [_claim_data(claim) for claim in entry.claims],
        "related": [other.slug for other in entry.related],
        "similar": [
            {"slug": likeness.entry.slug, "score": round(likeness.score, 4)} for likeness in entry.similar
        ],
    }


def _claim_data(claim: Claim) -> Mapping[str, str]:
    return {name: value for name, value in vars(claim).items() if value is not None}


def _vocabulary(library: Library) -> dict[str, Any]:
    return {
        "facets": [
            {
                "id": facet.id,
                "label": facet.label,
                "question": facet.question,
                "view": facet.view,
                "terms": [
                    {"id": t.id, "label": t.label, "definition": t.definition}
                    | ({"parent": t.parent} if t.parent else {})
                    for t in facet.terms
                ],
            }
            for facet in library.facets.values()
        ],
        "properties": [vars(prop) for prop in library.properties.values()],
    }


def _paper_data(paper: Paper) -> dict[str, Any]:
    return dict(vars(paper))
