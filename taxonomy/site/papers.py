"""The bibliography: by year, as a script to search in, and the lists that it was drawn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from taxonomy import paths
from taxonomy.site.library import Paper

FIRST_YEAR_ALONE = 2015
"""Papers before this year share a page."""

CARD_SOURCE = "efficiency-zoo"
"""The name under which the bibliography keeps papers that were added for a card and stand in no list."""


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


def years_of(papers: Sequence[Paper]) -> list[Year]:
    """The pages of all ``papers``, which come newest first."""

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


def source_facts() -> dict[str, dict[str, str]]:
    """Licence, commit and date of each list that the bibliography was drawn from, by ``owner/name``."""
    path = paths.PACKAGE / "bibliography_sources.jsonl"
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row["name"]: row for row in rows}


def paper_index(papers: Sequence[Paper]) -> bytes:
    """The bibliography as a script: unlike JSON, a page that was opened from a folder may load it.

    Topics and venues are written once and numbered; a missing value is 0.
    """
    topics = sorted({topic for paper in papers for topic in paper.topics})
    venues = sorted({paper.venue for paper in papers if paper.venue})
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
        for paper in papers
    ]
    content = {"topics": topics, "venues": ["", *venues], "rows": rows}
    return f"window.zooPapers={json.dumps(content, ensure_ascii=False, separators=(',', ':'))};\n".encode()
