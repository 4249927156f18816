"""Rows of the catalogue from reference runs, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection

from taxonomy import schema
from taxonomy.catalog.filling import insert
from taxonomy.runs import Run, digest, run_row
from taxonomy.scores import scores_of

RUNS_AT_ONCE = 1000
"""How many runs are put into the catalogue by one statement."""


def fill_runs(connection: Connection, runs: Sequence[Run]) -> None:
    """All runs table by table, which is many times as fast as one by one; a key that comes again is left out."""
    once = list({run.key: run for run in reversed(runs)}.values())[::-1]
    models = _numbered((run.model, run.model_revision) for run in once)
    environments = _numbered(digest(run.environment) for run in once)
    facts = {(run.model, run.model_revision): dict(run.model_facts) for run in reversed(once)}
    told = {digest(run.environment): dict(run.environment) for run in once}
    insert(
        connection,
        schema.model,
        [
            {"id": number, "ref": ref, "revision": revision, "facts": facts[ref, revision]}
            for (ref, revision), number in models.items()
        ],
    )
    insert(
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
        insert(connection, schema.run, rows)
        insert(
            connection,
            schema.run_method,
            [{"slug": slug, "run": number} for number, run in part for slug in run.methods],
        )
        figures = [{**vars(figure), "run": number} for number, run in part for figure in run.measurements]
        insert(connection, schema.measurement, figures)
        insert(connection, schema.score, list(_score_rows(part)))


def _score_rows(runs: Iterable[tuple[int, Run]]) -> Iterator[dict[str, Any]]:
    for number, run in runs:
        figures = [(f.task, f.quantity, f.arm, f.median, f.spread, f.unit) for f in run.measurements]
        for score in scores_of(figures).values():
            yield {"run": number, **{name: getattr(score, name) for name in score.__slots__}}


def _numbered(names: Iterable[Any]) -> dict[Any, int]:
    """Each name once, numbered from 1 in the order of first appearance."""
    return {name: number for number, name in enumerate(dict.fromkeys(names), 1)}
