"""From what users ask for to SQL: years, words to look for, conditions with their bound values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from taxonomy.errors import QueryError
from taxonomy.vocabulary import Facet

Years = tuple[int | None, int | None]
"""First and last year, both included; ``None`` = open."""


def parse_years(text: str) -> Years:
    """``2024``, ``2023..2025``, ``2024..`` or ``..2022``, both ends included.

    Raises:
        QueryError: the text is none of these, or runs backwards.
    """
    match = re.fullmatch(r"\s*(\d{4})?\s*(\.\.)?\s*(\d{4})?\s*", text)
    if not match or not (match[1] or match[3]) or (match[1] and match[3] and not match[2]):
        raise QueryError(
            f"'{text}' is not a year or a range of years; write 2024, 2023..2025, 2024.. or ..2022"
        )
    first, last = (int(year) if year else None for year in (match[1], match[3]))
    if not match[2]:
        return first, first
    if first and last and first > last:
        raise QueryError(f"'{text}' runs backwards; write {last}..{first}")
    return first, last


def match_expression(words: str) -> str | None:
    """What a user typed as an FTS5 expression: all words must occur, the last one may be the beginning of a word.

    ``"..."`` keeps a phrase together; everything else that FTS5 would read as syntax is plain text. ``None`` when
    there is no letter or digit to look for.
    """
    parts: list[str] = []
    for phrase, word in re.findall(r'"([^"]*)"|([^\s"]+)', words):
        # The tokenizer splits at everything but letters and digits; "top-k" must stay a phrase, not become two words.
        tokens = re.findall(r"\w+", (phrase or word).replace("_", " "))
        if tokens:
            parts.append('"' + " ".join(tokens) + '"')
    if not parts:
        return None
    if not words.rstrip().endswith('"'):
        parts[-1] += " *"
    return " AND ".join(parts)


class Conditions:
    """SQL conditions that all must hold, with their bound values."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.values: list[Any] = []

    def add(self, text: str, *values: Any) -> None:
        """One more condition, with a question mark for each value."""
        self.texts.append(text)
        self.values += values

    def years(self, column: str, years: Years | None) -> None:
        """``column`` lies within ``years``."""
        for sign, year in zip((">=", "<="), years or (None, None), strict=True):
            if year is not None:
                self.add(f"{column} {sign} ?", year)

    @property
    def where(self) -> str:
        """The whole clause; empty without conditions."""
        return " WHERE " + " AND ".join(self.texts) if self.texts else ""


def marks(values: Sequence[Any]) -> str:
    """Places for a list of bound values: ``?, ?, ?``."""
    return ", ".join("?" * len(values))


def below(facet: Facet, terms: Iterable[str]) -> list[str]:
    """``terms`` and everything below them, in the order of the vocabulary."""
    chosen: set[str] = set(terms)
    for term in facet.terms:  # parents stand before their children
        if term.parent in chosen:
            chosen.add(term.id)
    return [term.id for term in facet.terms if term.id in chosen]
