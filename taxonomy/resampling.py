"""Other samples of the same questions: what chance in the choice of questions does to figures that rest on them.

A sample draws as many questions as were asked, with replacement, and the same ones for all runs that were asked the
same task: methods stay paired, as do a method and the unmodified model.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TypeAlias

import numpy as np

from taxonomy.evidence import Trial

Outcomes: TypeAlias = Mapping[str, Mapping[str, tuple[str, str]]]
"""By key of the run and by task: which questions the unmodified model and the method answered rightly (1 or 0 each)."""


def stored_outcomes(db: sqlite3.Connection, quantity: str = "accuracy") -> Outcomes:
    """Of all runs of a built catalogue that kept them."""
    found = {}
    beginning = f"{quantity}: "
    query = "SELECT key, json_extract(report, '$.outcomes') FROM run WHERE status = 'done'"
    for key, text in db.execute(query):
        rows = json.loads(text or "{}")
        tasks = {
            name.removeprefix(beginning): (arms["dense"], arms["method"])
            for name, arms in rows.items()
            if name.startswith(beginning) and len(arms) == 2
        }
        if tasks:
            found[key] = tasks
    return found


def samples(
    trials: Sequence[Trial], outcomes: Outcomes, quantity: str, count: int, seed: int = 0
) -> Iterator[list[Trial]] | None:
    """The same trials, with the scores of ``quantity`` that other samples of questions give.

    Args:
        trials: finished runs.
        outcomes: of them.
        quantity: a share of right answers.
        count: how many samples.
        seed: of the draws.

    Returns:
        ``count`` lists in the order of ``trials``, or ``None`` where the outcomes of a trial are not known.
    """
    answered = [_answered(trial, outcomes, quantity) for trial in trials]
    known = [found for found in answered if found is not None]
    if not known or len(known) < len(answered):
        return None
    sizes = {(task, len(dense)) for found in known for task, (dense, _) in found.items()}
    random = np.random.default_rng(seed)
    drawn = {
        (task, size): random.multinomial(size, np.full(size, 1 / size), size=count)
        for task, size in sorted(sizes)
    }
    kept = [
        [_kept(drawn[task, len(dense)], dense, own) for task, (dense, own) in found.items()]
        for found in known
    ]
    return (
        _sample(trials, [[part[draw] for part in parts] for parts in kept], quantity) for draw in range(count)
    )


def _answered(trial: Trial, outcomes: Outcomes, quantity: str) -> dict[str, tuple[str, str]] | None:
    """Right and wrong by task, in the order of the score's tasks."""
    rows = {task: pair for run in trial.runs for task, pair in outcomes.get(run.key, {}).items()}
    tasks = trial.scores[quantity].tasks
    return {task: rows[task] for task in tasks} if all(task in rows for task in tasks) else None


def _kept(drawn: np.ndarray, dense: str, own: str) -> list[float]:
    """Share of the unmodified model's accuracy that is left, for each of ``drawn [samples, questions]``.

    A sample in which the unmodified model is never right counts it as right once: the share stays finite.
    """
    before, after = (drawn @ np.array([int(answer) for answer in text]) for text in (dense, own))
    shares: list[float] = (after / np.maximum(before, 1)).tolist()
    return shares


def _sample(trials: Sequence[Trial], parts: Sequence[Sequence[float]], quantity: str) -> list[Trial]:
    made = []
    for trial, values in zip(trials, parts, strict=True):
        score = replace(trial.scores[quantity], parts=tuple(values), value=fmean(values))
        made.append(replace(trial, scores={**trial.scores, quantity: score}))
    return made
