"""The bibliography: one paper of the field per line of ``bibliography.jsonl``.

Facts only (title, identifiers, venue, year, code link, topics, source lists); see ``bibliography.md`` for where they
come from and how far they can be trusted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taxonomy.errors import CatalogError
from taxonomy.paths import BIBLIOGRAPHY

_TEXT = ("arxiv", "doi", "url", "venue", "code")
_FIELDS = {"title", "year", "topics", "sources", "slug", *_TEXT}


@dataclass(frozen=True)
class Paper:
    """One paper. ``cards`` are the slugs of the cards it belongs to: usually none or one."""

    title: str
    arxiv: str | None = None
    doi: str | None = None
    url: str | None = None
    venue: str | None = None
    year: int | None = None
    code: str | None = None
    topics: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    cards: tuple[str, ...] = ()


def parse_paper(line: str, where: str) -> Paper:
    """Read one line of the bibliography; ``where`` names it in errors.

    Raises:
        CatalogError: one sentence saying which line and which field.
    """
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise CatalogError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise CatalogError(f"{where}: a paper must be a JSON object")
    unknown = sorted(row.keys() - _FIELDS)
    if unknown:
        raise CatalogError(f"{where}: unknown field '{unknown[0]}'; known: {', '.join(sorted(_FIELDS))}")
    if not isinstance(row.get("title"), str) or not row["title"].strip():
        raise CatalogError(f"{where}: 'title' must be a text that is not empty")
    for name in _TEXT:
        if not isinstance(row.get(name), str | None):
            raise CatalogError(f"{where}: '{name}' must be a text or null")
    year = row.get("year")
    if isinstance(year, bool) or not isinstance(year, int | None):
        raise CatalogError(f"{where}: 'year' must be a whole number or null")
    lists = {name: row.get(name, []) for name in ("topics", "sources", "slug")}
    for name, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise CatalogError(f"{where}: '{name}' must be a list of texts")
        if len(set(values)) != len(values):
            raise CatalogError(f"{where}: '{name}' repeats an entry")
    return Paper(
        title=row["title"].strip(),
        year=year,
        topics=tuple(lists["topics"]),
        sources=tuple(lists["sources"]),
        cards=tuple(lists["slug"]),
        **{name: row.get(name) for name in _TEXT},
    )


def load_bibliography(path: Path = BIBLIOGRAPHY) -> tuple[Paper, ...]:
    """All papers, in the order of the file; an arXiv id may occur once.

    Raises:
        CatalogError: the file is missing, or a line is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CatalogError(f"the bibliography cannot be read: {error}") from None
    papers = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        paper = parse_paper(line, f"{path.name} line {number}")
        if paper.arxiv is not None:
            first = seen.setdefault(paper.arxiv, number)
            if first != number:
                raise CatalogError(
                    f"{path.name} line {number}: arXiv {paper.arxiv} is already on line {first}"
                )
        papers.append(paper)
    return tuple(papers)
