"""Runs that measured one task each, put together: a method at one setting on all its tasks is one trial."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from taxonomy.evidence.trial import Trial
from taxonomy.scores import ALL_GAINS, Score, pooled


def over_tasks(found: Iterable[Trial]) -> list[Trial]:
    """Pool the trials that differ in nothing but their task.

    These are the cells of a plan that share a method and its setting; and runs whose gain and quality both are of one
    and the same task, which speak for that task alone. Where a task was measured twice, the later one in ``found``
    stands.
    """
    left: list[Trial] = []
    groups: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for trial in found:
        place = (trial.model, trial.hardware, trial.device, trial.dtype, trial.protocol)
        if trial.trial is not None:
            groups[trial.trial, place].append(trial)
        elif _speaks_for_one_task(trial):
            settings = json.dumps(trial.settings, sort_keys=True)
            groups[trial.method, settings, place, frozenset(trial.scores)].append(trial)
        else:
            left.append(trial)
    return left + [_pooled(members) for members in groups.values()]


def _speaks_for_one_task(trial: Trial) -> bool:
    """Whether it has a gain, and all of its scores are of the same task."""
    tasks = {score.tasks for score in trial.scores.values()}
    only = next(iter(tasks)) if len(tasks) == 1 else ()
    return len(only) == 1 and any(only) and any(name in trial.scores for name in ALL_GAINS)


def _pooled(members: Sequence[Trial]) -> Trial:
    """One trial of several, dated as the newest."""
    latest: dict[str, dict[tuple[str, ...], tuple[Score, Trial]]] = defaultdict(dict)
    for trial in members:
        for name, score in trial.scores.items():
            latest[name][score.tasks] = (score, trial)
    kept = {trial.key: trial for rows in latest.values() for _, trial in rows.values()}
    if len(kept) == 1:
        return next(iter(kept.values()))
    scores = {name: pooled([rows[tasks][0] for tasks in sorted(rows)]) for name, rows in latest.items()}
    newest = max(kept.values(), key=lambda trial: (trial.started, trial.key))
    return replace(newest, scores=scores, members=tuple(sorted(kept.values(), key=_by_tasks)))


def _by_tasks(trial: Trial) -> tuple[Any, ...]:
    return sorted(score.tasks for score in trial.scores.values()), trial.key
