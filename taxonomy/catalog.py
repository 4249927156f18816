"""Building ``catalog.sqlite`` from text, and checking that it is what the text says.

Sources are cards, vocabulary, bibliography, reference measurements, verification results, and the parameters of the
implementations, which the caller passes in: this package never imports an implementation. The same sources give the
same bytes (with the same SQLite library): rows go in in a fixed order, nothing carries a time, and the file is
vacuumed. The file is written aside and renamed, so readers never see half of it; when nothing changed nothing is
written.

Runs of users live elsewhere, see ``taxonomy.runs``; its entry points are offered here too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import Connection

from taxonomy import files, paths, schema
from taxonomy.bibliography import Paper, load_bibliography
from taxonomy.card import Card, load_cards
from taxonomy.errors import CatalogError
from taxonomy.runs import (
    Measurement,
    Result,
    Run,
    RunStore,
    canonical_json,
    digest,
    open_runs,
    record_run,
    results,
    run_row,
)
from taxonomy.scores import scores_of
from taxonomy.vocabulary import FACETS, PROPERTIES
from taxonomy.working_out import work_out

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "Measurement",
    "Parameter",
    "Result",
    "Run",
    "RunStore",
    "Sources",
    "build",
    "built_bytes",
    "check",
    "open_runs",
    "parameters_of",
    "publish",
    "record_run",
    "results",
]

RUNS_AT_ONCE = 1000
"""How many runs are put into the catalogue by one statement."""

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


# --- sources --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One hyper-parameter of an implementation; ``type`` is readable, ``schema`` the JSON schema of the field."""

    name: str
    type: str
    default: Any
    required: bool
    description: str
    schema: Mapping[str, Any]


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


def parameters_of(cls: type[BaseModel]) -> tuple[Parameter, ...]:
    """The fields of a pydantic model as rows of the catalogue, in their order."""
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
    from pydantic_core import core_schema

    class Lenient(GenerateJsonSchema):
        """A field that has no JSON schema (a tensor, a callable) is shown without one."""

        def emit_warning(self, kind: Any, detail: str) -> None:
            """A default that JSON cannot hold is left out; that needs no warning."""

        def handle_invalid_for_json_schema(
            self, schema: core_schema.CoreSchema, error_info: str
        ) -> JsonSchemaValue:
            return {}

    document = cls.model_json_schema(schema_generator=Lenient)
    definitions = document.get("$defs", {})
    rows = []
    for name, field in cls.model_fields.items():
        shape = document.get("properties", {}).get(field.alias or name, {})
        kept = {key: value for key, value in shape.items() if key not in ("title", "description", "default")}
        rows.append(
            Parameter(
                name=name,
                type=_readable(shape, definitions),
                default=shape.get("default"),
                required=field.is_required(),
                description=" ".join((field.description or "").split()),
                schema=kept,
            )
        )
    return tuple(rows)


_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _readable(shape: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema in a few words: ``number > 0, <= 1``, ``greedy | sample``, ``list of integer``."""
    if "$ref" in shape:
        name = str(shape["$ref"]).rpartition("/")[2]
        target = definitions.get(name, {})
        return _readable(target, definitions) if "enum" in target else name
    if "enum" in shape:
        return " | ".join(str(value) for value in shape["enum"])
    if "const" in shape:
        return str(shape["const"])
    for key in ("anyOf", "oneOf"):
        if key in shape:
            return " | ".join(dict.fromkeys(_readable(option, definitions) for option in shape[key]))
    kind = {"null": "none", "string": "text", "boolean": "yes or no"}.get(
        shape.get("type", ""), shape.get("type", "any")
    )
    if kind == "array":
        return f"list of {_readable(shape.get('items', {}), definitions)}"
    bounds = [f"{sign} {shape[key]:g}" for key, sign in _BOUNDS.items() if key in shape]
    return f"{kind} {', '.join(bounds)}" if bounds else str(kind)


# --- building -------------------------------------------------------------------------------------------------


def build(sources: Sources, target: Path | None = None) -> bool:
    """Write the catalogue made from ``sources`` to ``target`` (default: the one reading commands use).

    Returns:
        Whether anything was written: an unchanged catalogue is left alone.

    Raises:
        CatalogError: the sources contradict each other, or ``target`` cannot be written.
    """
    target = target or paths.catalog_file()
    content = built_bytes(sources)
    try:
        if target.is_file() and target.read_bytes() == content:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(aside).chmod(0o644)
            Path(aside).replace(target)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CatalogError(f"{target} cannot be written: {error.strerror or error}") from None
    return True


def built_bytes(sources: Sources) -> bytes:
    """The catalogue made from ``sources``, as the bytes of a SQLite file."""
    with tempfile.TemporaryDirectory(prefix="zoo-catalog-") as folder:
        path = Path(folder) / "catalog.sqlite"
        engine = sa.create_engine(f"sqlite:///{path}", json_serializer=canonical_json)

        @sa.event.listens_for(engine, "connect")
        def _configure(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA page_size = 4096")
            connection.execute("PRAGMA journal_mode = OFF")  # a scratch file: on failure it is thrown away
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA application_id = {files.APPLICATION_ID}")

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        try:
            with engine.begin() as connection:
                schema.create_all(connection)
                schema.create_tables(connection, schema.worked_out)
                _fill(connection, sources)
                work_out(connection)
                schema.index_text(connection)
        finally:
            engine.dispose()
        finished = sqlite3.connect(path, isolation_level=None)
        try:
            finished.execute("ANALYZE")
            finished.execute("VACUUM")
        finally:
            finished.close()
        return path.read_bytes()


_RUNS = {
    table.name
    for table in (schema.model, schema.environment, schema.run, schema.run_method, schema.measurement)
}
"""Tables of runs: in a user's catalogue they are the user's."""


def publish(sources: Sources, where: str | None = None) -> bool:
    """Put methods, vocabulary and bibliography beside the runs of the user's catalogue, so that SQL can join them.

    Meant for the PostgreSQL database of a team; a SQLite file takes them too. What an earlier call wrote is replaced,
    in one transaction; runs stay as they are, and the reference runs of the zoo do not get among them.

    Args:
        sources: what the catalogue is made from.
        where: file or SQLAlchemy URL; ``None`` = the user's own catalogue.

    Returns:
        Whether anything was written: what is there already is left alone.

    Raises:
        CatalogError: the sources contradict each other, or the catalogue cannot be opened or written.
    """
    sources = replace(sources, runs=())
    meta = schema.meta
    with open_runs(where) as store, store.writing() as connection:
        published = connection.execute(sa.select(meta.c.value).where(meta.c.key == "sources")).scalar()
        if published == sources.digest():
            return False
        connection.execute(meta.delete().where(meta.c.key == "sources"))
        for table in reversed(schema.metadata.sorted_tables):
            if table is not meta and table.name not in _RUNS:
                connection.execute(table.delete())
        schema.create_views(connection)  # their columns come from the vocabulary
        _fill_text(connection, sources)
        schema.index_text(connection)
    return True


def _fill(connection: Connection, sources: Sources) -> None:
    _insert(connection, schema.meta, [{"key": "kind", "value": "built"}])
    _fill_text(connection, sources)
    _fill_runs(connection, sources.runs)


def _fill_text(connection: Connection, sources: Sources) -> None:
    """Everything but runs."""
    cards = [sources.cards[slug] for slug in sorted(sources.cards)]
    _insert(connection, schema.meta, [{"key": "sources", "value": sources.digest()}])
    _fill_vocabulary(connection)
    _insert(
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
    _insert(
        connection,
        schema.verification,
        [{"model": "", "version": None, "detail": None, **row} for row in sources.verification],
    )


def _fill_runs(connection: Connection, runs: Sequence[Run]) -> None:
    """All runs table by table, which is many times as fast as one by one; a key that comes again is left out."""
    once = list({run.key: run for run in reversed(runs)}.values())[::-1]
    models = _numbered((run.model, run.model_revision) for run in once)
    environments = _numbered(digest(run.environment) for run in once)
    facts = {(run.model, run.model_revision): dict(run.model_facts) for run in reversed(once)}
    told = {digest(run.environment): dict(run.environment) for run in once}
    _insert(
        connection,
        schema.model,
        [
            {"id": number, "ref": ref, "revision": revision, "facts": facts[ref, revision]}
            for (ref, revision), number in models.items()
        ],
    )
    _insert(
        connection,
        schema.environment,
        [
            {"id": number, "digest": name, "hardware": told[name]["hardware"], "facts": told[name]}
            for name, number in environments.items()
        ],
    )
    for start in range(0, len(once), RUNS_AT_ONCE):
        part = list(enumerate(once[start : start + RUNS_AT_ONCE], start + 1))
        rows = [
            run_row(run, models[run.model, run.model_revision], environments[digest(run.environment)])
            | {"id": number}
            for number, run in part
        ]
        _insert(connection, schema.run, rows)
        _insert(
            connection,
            schema.run_method,
            [{"slug": slug, "run": number} for number, run in part for slug in run.methods],
        )
        figures = [{**vars(figure), "run": number} for number, run in part for figure in run.measurements]
        _insert(connection, schema.measurement, figures)
        _insert(connection, schema.score, list(_score_rows(part)))


def _score_rows(runs: Iterable[tuple[int, Run]]) -> Iterator[dict[str, Any]]:
    for number, run in runs:
        figures = [(f.task, f.quantity, f.arm, f.median, f.spread, f.unit) for f in run.measurements]
        for score in scores_of(figures).values():
            yield {"run": number, **{name: getattr(score, name) for name in score.__slots__}}


def _numbered(names: Iterable[Any]) -> dict[Any, int]:
    """Each name once, numbered from 1 in the order of first appearance."""
    return {name: number for number, name in enumerate(dict.fromkeys(names), 1)}


def _insert(connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        try:
            connection.execute(table.insert(), list(rows))
        except sa.exc.IntegrityError as error:
            raise CatalogError(
                f"the sources contradict each other in table {table.name}: {error.orig}"
            ) from None


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
    _insert(connection, schema.facet, facets)
    for facet in FACETS.values():  # parents stand before their children in the vocabulary
        rows = [
            {**asdict(term), "facet": facet.id, "position": place} for place, term in enumerate(facet.terms)
        ]
        _insert(connection, schema.term, rows)
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
    _insert(connection, schema.property_, properties)


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
    _insert(connection, schema.method_term, terms)
    _insert(connection, schema.method_property, properties)
    _insert(connection, schema.claim, claims)
    _insert(connection, schema.note, notes)
    _insert(connection, schema.related, related)


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
    _insert(connection, schema.parameter, rows)


def _fill_papers(connection: Connection, sources: Sources, cards: Sequence[Card]) -> None:
    papers = sources.papers
    own = ("title", "arxiv", "doi", "url", "venue", "year", "code")
    _insert(
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
        _insert(connection, names, [{"id": number, "name": name} for name, number in ids.items()])
        pairs = [
            (paper, number) for paper, row in enumerate(lists, 1) for number in sorted(ids[n] for n in row)
        ]
        _insert(connection, link, [{"paper": paper, names.name: number} for paper, number in pairs])
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
    _insert(
        connection, schema.method_paper, [{"method": slug, "paper": number} for slug, number in sorted(links)]
    )


# --- checking -------------------------------------------------------------------------------------------------


def check(sources: Sources, target: Path | None = None) -> str | None:
    """Compare the committed catalogue with what ``sources`` say, table by table.

    Returns:
        One line saying what differs, or ``None``. Bytes are compared too, but only between files written by the same
        SQLite version, which is part of the format.

    Raises:
        CatalogError: there is no catalogue, or it is damaged or foreign.
    """
    target = target or paths.catalog_file()
    content = built_bytes(sources)
    with files.plain_errors(str(target)):
        committed = files.connect(target, immutable=True)
        try:
            expected = sqlite3.connect(":memory:")
            try:
                with tempfile.NamedTemporaryFile(suffix=".sqlite", delete=False) as scratch:
                    scratch.write(content)
                try:
                    expected.execute("ATTACH ? AS built", (scratch.name,))
                    differing = list(_differences(committed, expected))
                    expected.execute("DETACH built")
                finally:
                    Path(scratch.name).unlink()
            finally:
                expected.close()
        finally:
            committed.close()
    if differing:
        return f"{target.name} is out of date: {'; '.join(differing)}; run: zoo catalog build"
    actual = target.read_bytes()
    version = slice(96, 100)  # SQLITE_VERSION_NUMBER of the library that wrote the file
    if actual[version] == content[version] and actual != content:
        return f"{target.name} has the right rows but other bytes than a fresh build; run: zoo catalog build"
    return None


def _differences(committed: sqlite3.Connection, expected: sqlite3.Connection) -> Iterator[str]:
    """One phrase per table (or definition) that is not the same in both; ``expected`` has the build attached."""
    definition = "SELECT name, sql FROM {}sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
    old = dict(committed.execute(definition.format("")))
    new = dict(expected.execute(definition.format("built.")))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        yield f"the definition of {_few(changed)} changed"
    for table in (*schema.metadata.sorted_tables, *schema.worked_out.sorted_tables):
        if table.name in changed:
            continue
        keys = [column.name for column in table.primary_key] if table.name != "method" else ["slug"]
        columns = keys + [
            column.name for column in table.columns if column.name not in keys and column.name != "id"
        ]
        chosen = ", ".join(f'"{name}"' for name in columns)
        query = f'SELECT {chosen} FROM {{}}"{table.name}"'
        before = {tuple(row[: len(keys)]): tuple(row) for row in committed.execute(query.format(""))}
        after = {tuple(row[: len(keys)]): tuple(row) for row in expected.execute(query.format("built."))}
        yield from _phrases(table.name, before, after)


def _phrases(table: str, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[str]:
    added, gone = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    changed = sorted(key for key in before.keys() & after.keys() if before[key] != after[key])
    for verb, keys in (("lacks", added), ("has too many", gone), ("has changed", changed)):
        if keys:
            shown = _few(list(dict.fromkeys(str(key[0]) for key in keys)))
            yield f"table {table} {verb} {len(keys)} row{'s' if len(keys) > 1 else ''} ({shown})"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
