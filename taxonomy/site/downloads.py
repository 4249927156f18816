"""The files of the data page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taxonomy.queries import Claim
from taxonomy.site.library import Entry, Library, Paper


@dataclass(frozen=True)
class Download:
    """A file of the data page."""

    name: str
    content: bytes | Path = field(repr=False)
    what: str
    how: str

    @property
    def size(self) -> str:
        """Its length for people, in decimal units."""
        length = self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)
        return f"{length / 1e6:.1f} MB" if length >= 1_000_000 else f"{max(1, round(length / 1e3))} kB"


def downloads(library: Library, catalog: bytes | Path | None) -> Iterator[Download]:
    """All of them; without ``catalog`` the catalogue itself is left out."""
    entries, papers = library.entries, library.papers
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
        _csv(*_method_table(library)),
        "One line per card: identity, facets and properties.",
        "Several terms in one cell are separated by semicolons; an empty property does not apply.",
    )
    yield Download(
        "vocabulary.json",
        json.dumps(_vocabulary(library), ensure_ascii=False, indent=1).encode() + b"\n",
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
    )


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
