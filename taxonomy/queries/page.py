"""Everything the catalogue knows about one method."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, fields
from typing import Any

from taxonomy.queries.bibliography import PaperRow, papers_of
from taxonomy.queries.conditions import Conditions
from taxonomy.queries.names import resolve
from taxonomy.queries.stored_json import StoredFacets, StoredProperties


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter of the implementation."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


@dataclass(frozen=True)
class Claim:
    """A figure that a source reports, as reported."""

    model: str
    task: str
    metric: str
    budget: str | None
    value: str
    baseline: str | None
    source: str | None
    note: str | None


@dataclass(frozen=True)
class Check:
    """A golden case, or an executed property or facet (``kind``). ``model`` is empty for golden cases."""

    kind: str
    subject: str
    model: str
    passed: bool
    version: str | None
    detail: str | None


@dataclass(frozen=True)
class Measured:
    """A reference measurement. Medians; ``ratio`` is method over dense where the run stored it."""

    method: str
    model: str
    hardware: str
    started: str
    task: str
    quantity: str
    unit: str
    arm: str
    median: float
    spread: float | None
    n: int


@dataclass(frozen=True)
class Similar:
    """Another method, with the weighted share of facet terms the two have in common, in ``(0, 1]``."""

    slug: str
    name: str
    score: float
    implemented: bool


@dataclass(frozen=True)
class MethodPage:
    """Everything the catalogue knows about one method.

    ``unverified_claims`` were recalled, not read: whoever shows them must say so. ``notes`` are by kind: ``note``,
    ``paper_vs_code``, ``deviation``, ``reconstructed``.
    """

    slug: str
    name: str
    title: str
    kind: str
    summary: str
    year: int
    venue: str | None
    family: str
    implemented: bool
    authors: tuple[str, ...]
    arxiv: tuple[str, ...]
    code: str | None
    code_license: str | None
    code_commit: str | None
    basis: str
    shown_on: tuple[str, ...]
    facets: dict[str, tuple[str, ...]]
    properties: dict[str, bool]
    parameters: tuple[Parameter, ...]
    claims: tuple[Claim, ...]
    unverified_claims: tuple[Claim, ...]
    measurements: tuple[Measured, ...]
    checks: tuple[Check, ...]
    notes: dict[str, tuple[str, ...]]
    related: tuple[str, ...]
    similar: tuple[Similar, ...]
    papers: tuple[PaperRow, ...]
    bibtex: str


def show(db: sqlite3.Connection, name: str) -> MethodPage:
    """Everything about one method; raises ``QueryError`` with the nearest names when there is none."""
    slug = resolve(db, name)
    cursor = db.execute("SELECT * FROM method WHERE slug = ?", (slug,))
    row = dict(zip((column[0] for column in cursor.description), cursor.fetchone(), strict=True))
    lists: dict[str, Any] = {key: tuple(json.loads(row[key])) for key in ("authors", "arxiv", "shown_on")}
    plain = (
        "name",
        "title",
        "kind",
        "summary",
        "year",
        "venue",
        "family",
        "code",
        "code_license",
        "code_commit",
    )
    notes: dict[str, list[str]] = {"note": [], "paper_vs_code": [], "deviation": [], "reconstructed": []}
    for kind, text in db.execute(
        "SELECT kind, text FROM note WHERE method = ? ORDER BY kind, position", (slug,)
    ):
        notes[kind].append(text)
    related = db.execute("SELECT other FROM related WHERE method = ? ORDER BY position", (slug,))
    return MethodPage(
        slug=slug,
        implemented=bool(row["implemented"]),
        basis=row["basis"],
        bibtex=row["bibtex"],
        facets=dict(StoredFacets(row["facets"])),
        properties=dict(StoredProperties(row["properties"])),
        parameters=_parameters(db, slug),
        claims=_claims(db, slug, verified=True),
        unverified_claims=_claims(db, slug, verified=False),
        measurements=measurements(db, slug),
        checks=_checks(db, slug),
        notes={kind: tuple(texts) for kind, texts in notes.items()},
        related=tuple(other for (other,) in related),
        similar=tuple(similar(db, slug)),
        papers=tuple(
            papers_of(db, "JOIN method_paper l ON l.paper = p.id WHERE l.method = ? ORDER BY p.id", [slug])
        ),
        **lists,
        **{name: row[name] for name in plain},
    )


def _parameters(db: sqlite3.Connection, slug: str) -> tuple[Parameter, ...]:
    query = 'SELECT name, type, "default", required, description FROM parameter WHERE method = ? ORDER BY position'
    return tuple(
        Parameter(name, kind, None if default is None else json.loads(default), bool(required), description)
        for name, kind, default, required, description in db.execute(query, (slug,))
    )


def _claims(db: sqlite3.Connection, slug: str, *, verified: bool) -> tuple[Claim, ...]:
    columns = ", ".join(field.name for field in fields(Claim))
    query = f"SELECT {columns} FROM claim WHERE method = ? AND verified = ? ORDER BY position"
    return tuple(Claim(*row) for row in db.execute(query, (slug, int(verified))))


def _checks(db: sqlite3.Connection, slug: str) -> tuple[Check, ...]:
    query = (
        "SELECT kind, subject, model, passed, version, detail FROM verification WHERE method = ?"
        " ORDER BY kind, subject, model"
    )
    return tuple(
        Check(kind, subject, model, bool(passed), version, detail)
        for kind, subject, model, passed, version, detail in db.execute(query, (slug,))
    )


def measurements(
    db: sqlite3.Connection, slug: str, *, quantity: str | None = None, limit: int = 500
) -> tuple[Measured, ...]:
    """Reference measurements of a method (stacks that hold it included), newest first."""
    wanted = Conditions()
    wanted.add("s.slug = ?", slug)
    wanted.add("r.status = 'done'")
    if quantity:
        wanted.add("x.quantity = ?", quantity)
    query = (
        "SELECT r.method, o.ref, e.hardware, r.started, x.task, x.quantity, x.unit, x.arm, x.median, x.spread, x.n"
        " FROM run_method s JOIN run r ON r.id = s.run JOIN measurement x ON x.run = r.id"
        " JOIN model o ON o.id = r.model JOIN environment e ON e.id = r.environment"
        f"{wanted.where} ORDER BY r.started DESC, r.key, x.task, x.quantity, x.arm LIMIT ?"
    )
    return tuple(Measured(*row) for row in db.execute(query, (*wanted.values, limit)))


def similar(db: sqlite3.Connection, slug: str, most: int = 5) -> list[Similar]:
    """Methods with the most alike facets (the weighted Jaccard index over terms, ties by slug); 5 are known."""
    query = """
        SELECT m.slug, m.name, s.score, m.implemented FROM similar s JOIN method m ON m.slug = s.other
        WHERE s.method = ? ORDER BY s.position LIMIT ?
    """
    return [
        Similar(other, name, round(score, 4), bool(implemented))
        for other, name, score, implemented in db.execute(query, (slug, most))
    ]


def default_text(parameter: Parameter) -> str:
    """A default value as a user would write it; ``required`` when there is none."""
    if parameter.required:
        return "required"
    default = parameter.default
    return default if isinstance(default, str) else json.dumps(default)
