"""Rows of the catalogue from cards, vocabulary and bibliography."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from taxonomy import schema
from taxonomy.card import Card
from taxonomy.catalog.sources import FACET_WEIGHTS, Sources
from taxonomy.errors import CatalogError
from taxonomy.runs import canonical_json
from taxonomy.vocabulary import FACETS, PROPERTIES


def insert(connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put ``rows`` into ``table``.

    Raises:
        CatalogError: a row contradicts another one.
    """
    if rows:
        try:
            connection.execute(table.insert(), list(rows))
        except sa.exc.IntegrityError as error:
            raise CatalogError(
                f"the sources contradict each other in table {table.name}: {error.orig}"
            ) from None


def fill_text(connection: Connection, sources: Sources) -> None:
    """Everything but runs.

    Raises:
        CatalogError: the sources contradict each other.
    """
    cards = [sources.cards[slug] for slug in sorted(sources.cards)]
    insert(connection, schema.meta, [{"key": "sources", "value": sources.digest()}])
    _fill_vocabulary(connection)
    insert(
        connection,
        schema.method,
        [_method_row(number, card, sources) for number, card in enumerate(cards, 1)],
    )
    _fill_details(connection, cards)
    _fill_parameters(connection, sources)
    _fill_papers(connection, sources, cards)
    for row in sources.verification:
        if row["method"] not in sources.cards:
            raise CatalogError(f"verification: there is no card '{row['method']}'")
    insert(
        connection,
        schema.verification,
        [{"model": "", "version": None, "detail": None, **row} for row in sources.verification],
    )


def _fill_vocabulary(connection: Connection) -> None:
    facets = [
        {
            "id": facet.id,
            "label": facet.label,
            "question": facet.question,
            "view": facet.view,
            "position": position,
            "weight": FACET_WEIGHTS.get(facet.id, 1.0),
        }
        for position, facet in enumerate(FACETS.values())
    ]
    insert(connection, schema.facet, facets)
    for facet in FACETS.values():  # parents stand before their children in the vocabulary
        rows = [
            {**asdict(term), "facet": facet.id, "position": place} for place, term in enumerate(facet.terms)
        ]
        insert(connection, schema.term, rows)
    properties = [
        {
            "id": prop.id,
            "label": prop.label,
            "statement": prop.statement,
            "contract": prop.check,
            "position": place,
        }
        for place, prop in enumerate(PROPERTIES.values())
    ]
    insert(connection, schema.property_, properties)


def _method_row(number: int, card: Card, sources: Sources) -> dict[str, Any]:
    plain = (
        "slug",
        "name",
        "title",
        "kind",
        "summary",
        "year",
        "venue",
        "code",
        "code_license",
        "bibtex",
        "family",
    )
    weight = sum(FACET_WEIGHTS.get(name, 1.0) * len(terms) for name, terms in card.facets.items())
    return {
        "id": number,
        **{name: getattr(card, name) for name in plain},
        "arxiv": list(card.arxiv),
        "authors": list(card.authors),
        "shown_on": list(card.shown_on),
        "facets": {name: list(terms) for name, terms in card.facets.items()},
        "properties": dict(card.properties),
        "implemented": card.slug in sources.implemented,
        "basis": card.fidelity.basis,
        "code_commit": card.fidelity.commit,
        "term_weight": weight,
    }


def _number(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _text(value: float | str | None) -> str | None:
    return f"{value:g}" if isinstance(value, int | float) else value


def _fill_details(connection: Connection, cards: Sequence[Card]) -> None:
    terms: list[dict[str, Any]] = []
    properties: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    related: list[dict[str, Any]] = []
    for card in cards:
        for name in FACETS:
            terms += [
                {"method": card.slug, "facet": name, "term": term, "position": position}
                for position, term in enumerate(card.terms(name))
            ]
        properties += [
            {"method": card.slug, "property": name, "value": card.properties[name]}
            for name in PROPERTIES
            if name in card.properties
        ]
        claims += [
            {
                **claim.model_dump(),
                "method": card.slug,
                "position": position,
                "value": _text(claim.value),
                "value_number": _number(claim.value),
                "baseline": _text(claim.baseline),
                "baseline_number": _number(claim.baseline),
            }
            for position, claim in enumerate(card.claims)
        ]
        kinds = {
            "note": card.notes,
            "paper_vs_code": card.fidelity.paper_vs_code,
            "deviation": card.fidelity.deviations,
            "reconstructed": card.fidelity.reconstructed,
        }
        notes += [
            {"method": card.slug, "kind": kind, "position": position, "text": text}
            for kind, texts in kinds.items()
            for position, text in enumerate(texts)
        ]
        related += [
            {"method": card.slug, "other": other, "position": position}
            for position, other in enumerate(card.related)
        ]
    insert(connection, schema.method_term, terms)
    insert(connection, schema.method_property, properties)
    insert(connection, schema.claim, claims)
    insert(connection, schema.note, notes)
    insert(connection, schema.related, related)


def _fill_parameters(connection: Connection, sources: Sources) -> None:
    rows = [
        {
            **asdict(parameter),
            "default": None if parameter.required else canonical_json(parameter.default),
            "method": slug,
            "position": position,
        }
        for slug, parameters in sorted((sources.parameters or {}).items())
        if slug in sources.cards
        for position, parameter in enumerate(parameters)
    ]
    insert(connection, schema.parameter, rows)


def _fill_papers(connection: Connection, sources: Sources, cards: Sequence[Card]) -> None:
    papers = sources.papers
    own = ("title", "arxiv", "doi", "url", "venue", "year", "code")
    insert(
        connection,
        schema.paper,
        [
            {"id": number, **{name: getattr(paper, name) for name in own}}
            for number, paper in enumerate(papers, 1)
        ],
    )
    labelled = (
        (schema.topic, schema.paper_topic, [paper.topics for paper in papers]),
        (schema.source, schema.paper_source, [paper.sources for paper in papers]),
    )
    for names, link, lists in labelled:
        ids = {name: number for number, name in enumerate(sorted({name for row in lists for name in row}), 1)}
        insert(connection, names, [{"id": number, "name": name} for name, number in ids.items()])
        pairs = [
            (paper, number) for paper, row in enumerate(lists, 1) for number in sorted(ids[n] for n in row)
        ]
        insert(connection, link, [{"paper": paper, names.name: number} for paper, number in pairs])
    # A paper belongs to a card when the bibliography says so, or when both name the same arXiv id.
    by_arxiv: dict[str, list[str]] = {}
    for card in cards:
        for identifier in card.arxiv:
            by_arxiv.setdefault(identifier, []).append(card.slug)
    links = {
        (slug, number)
        for number, paper in enumerate(papers, 1)
        for slug in (*paper.cards, *by_arxiv.get(paper.arxiv or "", ()))
        if slug in sources.cards
    }
    insert(
        connection, schema.method_paper, [{"method": slug, "paper": number} for slug, number in sorted(links)]
    )
