"""Papers of the bibliography, and its topics."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taxonomy.errors import QueryError
from taxonomy.queries.conditions import Conditions, Years, marks, match_expression
from taxonomy.queries.names import nearest


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
    wanted, join, order = Conditions(), "", "p.year IS NULL, p.year DESC, p.arxiv DESC, p.id"
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
                raise QueryError(f"there is no {table} '{name}'; {nearest(name, known)}")
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
    return papers_of(db, tail, [*values, *wanted.values, -1 if limit is None else limit])


def papers_of(db: sqlite3.Connection, tail: str, values: Sequence[Any]) -> list[PaperRow]:
    """Rows of ``paper p`` chosen by ``tail``, with their topics and cards."""
    chosen = f"SELECT p.* FROM paper p {tail}"
    rows = db.execute(chosen, values).fetchall()
    ids = [row[0] for row in rows]
    topics: dict[int, list[str]] = {number: [] for number in ids}
    cards: dict[int, list[str]] = {number: [] for number in ids}
    for start in range(0, len(ids), 500):  # SQLite limits the number of bound values
        part = ids[start : start + 500]
        query = f"""SELECT t.paper, o.name FROM paper_topic t JOIN topic o ON o.id = t.topic
            WHERE t.paper IN ({marks(part)}) ORDER BY o.id"""
        for number, topic in db.execute(query, part):
            topics[number].append(topic)
        query = f"SELECT paper, method FROM method_paper WHERE paper IN ({marks(part)}) ORDER BY method"
        for number, card in db.execute(query, part):
            cards[number].append(card)
    return [
        PaperRow(title, arxiv, doi, url, venue, year, code, tuple(topics[number]), tuple(cards[number]))
        for number, title, arxiv, doi, url, venue, year, code in rows
    ]


_BIBTEX_SPECIAL = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


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


@dataclass(frozen=True)
class TopicGap:
    """A topic of the bibliography, and how much of it the zoo covers."""

    topic: str
    papers: int
    cards: int
    implemented: int


def topics(db: sqlite3.Connection) -> list[TopicGap]:
    """All topics of the bibliography, with how many of their papers have a card, and how many methods run."""
    query = """
        SELECT o.name, u.papers, u.cards, u.implemented FROM topic o JOIN topic_use u ON u.topic = o.id ORDER BY o.id
    """
    return [TopicGap(*row) for row in db.execute(query)]
