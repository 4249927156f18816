"""The card: everything the taxonomy says about one method, benchmark or survey.

A card is data: ``taxonomy/cards/<slug>.toml``, validated by the models below. Parameters are not on the card;
they come from the implementation's own fields, so they cannot drift.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from taxonomy.errors import CardError
from taxonomy.vocabulary import FACETS, PROPERTIES

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - exercised on Python 3.10 only
    import tomli as tomllib

CARDS = Path(__file__).parent / "cards"

Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Claim(_Strict):
    """A figure its source reports. Never mixed with what was measured here."""

    model: str = Field(description="Model the figure was obtained on.")
    task: str = Field(description="Data set or kind of task.")
    metric: str = Field(description="What the figure counts, with its unit.")
    value: float | str = Field(description="The method's figure, as reported.")
    baseline: float | str | None = Field(None, description="The unmodified model's figure, as reported.")
    budget: str | None = Field(None, description="Setting: ratio, tokens kept, layers ...")
    source: str | None = Field(
        None, description="Where it stands: table, section, read-me, third-party summary."
    )
    note: str | None = None
    verified: bool = Field(
        True,
        description="Read from a source. False = recalled: kept for completeness, never displayed as a fact.",
    )


class Fidelity(_Strict):
    """How far the card and the implementation can be trusted."""

    basis: Literal["official-code", "paper-text", "abstract-only"] = Field(
        description="The best source that was read."
    )
    commit: str | None = Field(None, description="Commit or release of the official code that was read.")
    paper_vs_code: tuple[str, ...] = Field(
        (), description="Where paper and official code differ, and which of them is followed."
    )
    deviations: tuple[str, ...] = Field(
        (), description="Where the implementation here differs from the official code, and why."
    )
    reconstructed: tuple[str, ...] = Field((), description="Choices that no source states: honest guesses.")


class Card(_Strict):
    """One entry of the taxonomy."""

    slug: Slug
    name: str
    title: str = Field(description="Title of the paper or note.")
    kind: Literal["method", "baseline", "benchmark", "survey", "analysis"] = "method"
    summary: str = Field(
        min_length=40, max_length=900, description="Two to four sentences: what it does and why."
    )
    arxiv: tuple[Annotated[str, Field(pattern=r"^\d{4}\.\d{4,5}$")], ...] = ()
    year: int = Field(ge=1980, le=2100)
    venue: str | None = None
    authors: tuple[str, ...] = ()
    code: str | None = Field(None, pattern=r"^https://", description="Official (or reference) repository.")
    code_license: str | None = Field(None, description="Licence of that repository; absent = none stated.")
    shown_on: tuple[str, ...] = Field((), description="Models the authors report on.")
    facets: dict[str, tuple[str, ...]]
    properties: dict[str, bool] = Field(
        default_factory=dict, description="A property left out does not apply."
    )
    claims: tuple[Claim, ...] = ()
    fidelity: Fidelity
    notes: tuple[str, ...] = Field((), description="What someone who applies the method should know.")
    related: tuple[Slug, ...] = Field((), description="Cards it extends, corrects or is compared with.")

    @field_validator("facets")
    @classmethod
    def _known_terms(cls, facets: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, terms in facets.items():
            if name not in FACETS:
                raise ValueError(f"unknown facet '{name}'; known: {', '.join(FACETS)}")
            if not terms:
                raise ValueError(f"facet '{name}' is empty; leave it out instead")
            if len(set(terms)) != len(terms):
                raise ValueError(f"facet '{name}' repeats a term")
            for term in terms:
                if term not in FACETS[name]:
                    known = ", ".join(t.id for t in FACETS[name].terms)
                    raise ValueError(f"facet '{name}' has no term '{term}'; known: {known}")
        for required in ("family", "target", "where", "signal", "operation", "when", "training"):
            if required not in facets:
                raise ValueError(f"facet '{required}' is missing")
        return facets

    @field_validator("properties")
    @classmethod
    def _known_properties(cls, properties: dict[str, bool]) -> dict[str, bool]:
        for name in properties:
            if name not in PROPERTIES:
                raise ValueError(f"unknown property '{name}'; known: {', '.join(PROPERTIES)}")
        return properties

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        if self.slug in self.related:
            raise ValueError("a card cannot be related to itself")
        return self

    @property
    def family(self) -> str:
        """The first (main) family."""
        return self.facets["family"][0]

    def terms(self, facet: str) -> tuple[str, ...]:
        """Terms of one facet; empty when the facet does not apply."""
        return self.facets.get(facet, ())

    @property
    def bibtex(self) -> str:
        """A BibTeX entry made from what is known."""
        key = re.sub(r"[^a-z0-9]", "", self.slug) + str(self.year)
        rows: list[tuple[str, str]] = [("title", f"{{{self.title}}}")]
        if self.authors:
            rows.append(("author", " and ".join(self.authors)))
        rows.append(("year", str(self.year)))
        if self.arxiv:
            rows += [("eprint", self.arxiv[0]), ("archivePrefix", "arXiv")]
        if self.venue:
            rows.append(("note", self.venue))
        if self.code:
            rows.append(("url", self.code))
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in rows)
        return f"@misc{{{key},\n{body}\n}}"


def parse_card(text: str, where: str) -> Card:
    """Validate the TOML ``text`` of a card; ``where`` names it in errors.

    Raises:
        CardError: one line saying which file, which field, and what is accepted.
    """
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CardError(f"{where}: not valid TOML: {error}") from None
    try:
        return Card.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "card"
        raise CardError(f"{where}: {place}: {first['msg']}") from None


def load_card(path: Path) -> Card:
    """Read one card file; its name must be ``<slug>.toml``."""
    card = parse_card(path.read_text(encoding="utf-8"), path.name)
    if card.slug != path.stem:
        raise CardError(f"{path.name}: slug is '{card.slug}', so the file must be called {card.slug}.toml")
    return card


def load_cards(folder: Path = CARDS) -> dict[str, Card]:
    """All cards of ``folder``, sorted by slug; checks that related slugs exist."""
    cards = {card.slug: card for card in (load_card(path) for path in sorted(folder.glob("*.toml")))}
    for card in cards.values():
        for slug in card.related:
            if slug not in cards:
                raise CardError(f"{card.slug}.toml: related: there is no card '{slug}'")
    return cards


@cache
def builtin_card(slug: str) -> Card:
    """The built-in card ``slug``; raises ``CardError`` when there is none."""
    path = CARDS / f"{slug}.toml"
    if not path.is_file():
        raise CardError(f"no card called '{slug}'")
    return load_card(path)
