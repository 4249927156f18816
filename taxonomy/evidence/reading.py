"""Trials, read from the user's runs and the reference measurements."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from taxonomy import paths
from taxonomy.evidence.asking import Question, answers_of, bound_names
from taxonomy.evidence.pooling import over_tasks
from taxonomy.evidence.trial import BUDGETS, Trial
from taxonomy.scores import ALL_GAINS, COUNTED, HELPING, QUALITIES, SCORED, Score, scores_of


def trials(
    *,
    model: str | None = None,
    methods: Iterable[str] | None = None,
    hardware: str | None = None,
    gains: Iterable[str] = ALL_GAINS,
) -> list[Trial]:
    """Finished runs with their scores; of runs that asked for the same in the same environment, the newest.

    Runs that differ in nothing but their task are one trial (``taxonomy.evidence.pooling``).

    Args:
        model: only this model.
        methods: only runs of one of these, stacks that hold one included; ``None`` = all.
        hardware: only where this text is part of the hardware's name.
        gains: the gains that are read, besides all qualities.

    Raises:
        CatalogError: a catalogue cannot be read.
    """
    shipped, wanted = str(paths.catalog_file()), {*gains, *QUALITIES, *COUNTED}
    besides = {f"{quantity}-bound" for quantity in wanted} | HELPING
    chosen = _chosen(model, methods, hardware)
    own = answers_of(paths.user_catalog(), _questions("measurement", wanted | besides, chosen))
    *stored, given = answers_of(shipped, [*_questions("score", wanted, chosen), (_DEFAULTS, {})])
    defaults = _defaults(given)
    found = _assembled(own, "own", scores_of, defaults)
    found |= _assembled(stored, "reference", _stored, defaults)  # where both hold a run it is a reference run
    return over_tasks(_newest(found.values()))


def reference_trials(db: sqlite3.Connection) -> list[Trial]:
    """The same for all reference measurements of a built catalogue."""
    asked = _questions("score", SCORED, _chosen())
    answers = [db.execute(query, values).fetchall() for query, values in asked]
    found = _assembled(answers, "reference", _stored, _defaults(db.execute(_DEFAULTS)))
    return over_tasks(_newest(found.values()))


Conditions = tuple[list[str], dict[str, Any]]
"""SQL conditions on runs, models and environments, and the values bound in them."""


def _chosen(
    model: str | None = None, methods: Iterable[str] | None = None, hardware: str | None = None
) -> Conditions:
    """What ``trials`` is asked to look at."""
    texts = ["r.status = 'done'"]
    values: dict[str, Any] = {}
    if model is not None:
        texts.append("o.ref = :model")
        values["model"] = model
    if hardware is not None:
        texts.append("lower(e.hardware) LIKE :hardware ESCAPE '!'")
        values["hardware"] = f"%{_literal(hardware.lower())}%"
    if methods is not None:
        slugs = sorted(set(methods))
        # The plus keeps SQLite from starting at the runs of the methods, where those of one model are fewer.
        run = "r.id" if model is None else "+r.id"
        texts.append(f"{run} IN (SELECT run FROM run_method WHERE slug IN ({bound_names('m', len(slugs))}))")
        values |= {f"m{index}": slug for index, slug in enumerate(slugs)}
    return texts, values


_FACTS = (
    "SELECT r.id, r.key, r.method, o.ref, e.hardware, e.digest, r.device, r.dtype, r.protocol, r.started, r.config,"
    " r.trial, r.parameters"
)

_FIGURES = {
    "measurement": "SELECT x.run, x.task, x.quantity, x.arm, x.median, x.spread, x.unit FROM measurement x",
    "score": "SELECT x.run, x.quantity, x.tasks, x.parts, x.value, x.noise, x.bound, x.dense, x.method, x.unit"
    " FROM score x",
}
"""What is read of each table that scores can come from. Only the built catalogue has the second one."""


def _questions(table: str, quantities: Iterable[str], chosen: Conditions) -> list[Question]:
    """For the facts of runs, and for their figures in ``table``."""
    texts, values = chosen
    runs = "FROM run r JOIN model o ON o.id = r.model JOIN environment e ON e.id = r.environment"
    runs = f"{runs} WHERE {' AND '.join(texts)}"
    asked = {f"q{index}": quantity for index, quantity in enumerate(sorted(quantities))}
    wanted = bound_names("q", len(asked))
    figures = f"{_FIGURES[table]} WHERE x.quantity IN ({wanted}) AND x.run IN (SELECT r.id {runs})"
    return [(f"{_FACTS} {runs}", values), (figures, {**values, **asked})]


def _newest(found: Iterable[Trial]) -> list[Trial]:
    """One trial for each thing that was asked for in each environment, in the order of time."""
    newest: dict[tuple[str, str], Trial] = {}
    for trial in sorted(found, key=lambda trial: (trial.started, trial.key)):
        newest.pop((trial.config, trial.environment), None)  # what comes again moves to the end
        newest[trial.config, trial.environment] = trial
    return list(newest.values())


def _literal(text: str) -> str:
    """``text`` in a LIKE pattern with ``ESCAPE '!'``."""
    return text.replace("!", "!!").replace("%", "!%").replace("_", "!_")


_DEFAULTS = 'SELECT method, name, "default" FROM parameter WHERE NOT required'


def _defaults(rows: Iterable[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Default of every parameter by method, from the answer to ``_DEFAULTS``."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for method, name, default in rows:
        found[method][name] = json.loads(default) if default is not None else None
    return found


def _assembled(
    answers: Sequence[Sequence[Sequence[Any]]],
    origin: str,
    scores: Callable[[Sequence[Sequence[Any]]], Mapping[str, Score]],
    defaults: Mapping[str, Mapping[str, Any]],
) -> dict[str, Trial]:
    """Trials by key, from the facts of runs and their figures, of which ``scores`` makes the scores of one run."""
    facts, rows = answers
    figures: dict[int, list[Sequence[Any]]] = defaultdict(list)
    for row in rows:
        figures[row[0]].append(row[1:])
    found = {}
    for number, key, method, *rest, trial, parameters in facts:
        scored = scores(figures[number]) if number in figures else None
        if scored:
            given = json.loads(parameters) if isinstance(parameters, str) else parameters
            settings = _changed(method, given, defaults)
            found[key] = Trial(*(key, origin, method, *rest, settings, scored, trial))
    return found


def _stored(rows: Iterable[Sequence[Any]]) -> dict[str, Score]:
    return {row[0]: Score(row[0], _list(row[1]), _list(row[2]), *row[3:]) for row in rows}


@lru_cache(maxsize=4096)
def _list(text: str) -> tuple[Any, ...]:
    """A stored list; most runs have the same tasks."""
    return tuple(json.loads(text))


def _changed(
    method: str, given: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Parameters that are not at their default; those of a stack by ``slug.name``."""
    if "+" in method:
        nested = {
            slug: _changed(slug, values, defaults)
            for slug, values in given.items()
            if isinstance(values, Mapping)
        }
        return {f"{slug}.{name}": value for slug, values in nested.items() for name, value in values.items()}
    usual = defaults.get(method, {})
    return {
        name: value
        for name, value in given.items()
        if name in BUDGETS or (usual.get(name) != value and (value or usual.get(name)))
    }
