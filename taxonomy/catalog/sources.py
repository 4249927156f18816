"""The text that the catalogue is made from: cards, bibliography, measurements, verification."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taxonomy import files, paths
from taxonomy.bibliography import Paper, load_bibliography
from taxonomy.card import Card, load_cards
from taxonomy.catalog.parameters import Parameter
from taxonomy.errors import CatalogError
from taxonomy.runs import Run, canonical_json
from taxonomy.vocabulary import FACETS, PROPERTIES

FACET_WEIGHTS = {
    "signal": 3.0,
    "target": 2.0,
    "where": 2.0,
    "operation": 2.0,
    "family": 2.0,
    "generation": 2.0,
    "modality": 0.5,
    "architecture": 0.5,
}
"""How much a shared term makes two methods alike; other facets count 1. What decides and what is removed says more
about an idea than the models it was shown on."""


@dataclass(frozen=True)
class Sources:
    """Everything the built catalogue is made from.

    Attributes:
        cards: by slug.
        papers: the bibliography.
        runs: reference measurements.
        verification: rows with ``method``, ``kind``, ``subject``, ``passed``, and ``model``, ``version``, ``detail``.
        implemented: slugs of the methods that run; slugs without a card (third-party methods) are left out.
        parameters: hyper-parameters of each implementation.
    """

    cards: Mapping[str, Card]
    papers: Sequence[Paper] = ()
    runs: Sequence[Run] = ()
    verification: Sequence[Mapping[str, Any]] = ()
    implemented: frozenset[str] = frozenset()
    parameters: Mapping[str, Sequence[Parameter]] | None = None

    @classmethod
    def load(
        cls,
        implemented: Iterable[str] = (),
        parameters: Mapping[str, Sequence[Parameter]] | None = None,
        *,
        cards: Path = paths.CARDS,
        bibliography: Path = paths.BIBLIOGRAPHY,
        measurements: Path = paths.MEASUREMENTS,
        verification: Path = paths.VERIFICATION,
    ) -> Sources:
        """Read the text sources.

        Raises:
            CardError, CatalogError: one sentence saying which file and what is wrong.
        """
        return cls(
            cards=load_cards(cards),
            papers=load_bibliography(bibliography),
            runs=[Run.from_json(row, where) for where, row in _json_lines(measurements)],
            verification=[_verified(row, where) for where, row in _json_lines(verification)],
            implemented=frozenset(implemented),
            parameters=parameters,
        )

    def digest(self) -> str:
        """SHA-256 of the content of all sources, the vocabulary included."""
        content = hashlib.sha256()
        for part in self._parts():
            content.update(canonical_json(part).encode() + b"\n")
        return content.hexdigest()

    def _parts(self) -> Iterator[Any]:
        yield [files.REVISION, FACET_WEIGHTS]
        yield [
            [asdict(term) for term in facet.terms] + [facet.id, facet.label, facet.view]
            for facet in FACETS.values()
        ]
        yield [asdict(prop) for prop in PROPERTIES.values()]
        for slug in sorted(self.cards):
            yield self.cards[slug].model_dump(mode="json")
        for paper in self.papers:
            yield asdict(paper)
        for run in self.runs:
            yield run.to_json()
        yield list(self.verification)
        yield sorted(self.implemented)
        yield {slug: [asdict(row) for row in rows] for slug, rows in (self.parameters or {}).items()}


def _json_lines(folder: Path) -> Iterator[tuple[str, Any]]:
    """``(place, value)`` of every line of ``folder/*.jsonl``, files in order of name."""
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{folder.name}/{path.name} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CatalogError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise CatalogError(f"{where}: not a JSON object")
            yield where, row


_VERIFICATION = {"method": str, "kind": str, "subject": str, "passed": bool}

_VERIFICATION_MORE = {"model": str, "version": str, "detail": str}


def _verified(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name, kind in _VERIFICATION.items():
        if not isinstance(row.get(name), kind):
            raise CatalogError(
                f"{where}: '{name}' must be a {'text' if kind is str else 'yes or no (true, false)'}"
            )
    unknown = sorted(row.keys() - _VERIFICATION.keys() - _VERIFICATION_MORE.keys())
    if unknown:
        raise CatalogError(f"{where}: unknown field '{unknown[0]}'")
    if row["kind"] not in ("golden", "property", "facet"):
        raise CatalogError(f"{where}: 'kind' must be golden, property or facet")
    return row
