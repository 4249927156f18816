"""Runs put together: those that measured one task each are one trial, and so are the draws of a random choice."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from taxonomy.evidence.trial import Trial
from taxonomy.scores import ALL_GAINS, Score, averaged, pooled


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


def over_draws(found: Sequence[Trial]) -> list[Trial]:
    """One trial of those that differ in their method's seed only: the mean of the draws, in place of the luckiest.

    Where two have the same seed as well, something else tells them apart: those are left alone.
    """
    drawn = {trial.method for trial in found if _seeds(trial)}
    left: list[Trial] = []
    groups: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for trial in found:
        if trial.method not in drawn:
            left.append(trial)
            continue
        settings = json.dumps(_unseeded(trial), sort_keys=True)
        place = (trial.model, trial.hardware, trial.device, trial.dtype, trial.protocol)
        measured = frozenset((name, score.tasks) for name, score in trial.scores.items())
        groups[trial.method, settings, place, measured].append(trial)
    for draws in groups.values():
        apart = len({json.dumps(_seeds(trial), sort_keys=True) for trial in draws}) == len(draws)
        left += [_mean_draw(draws)] if apart and len(draws) > 1 else draws
    return left


def _seeds(trial: Trial) -> dict[str, Any]:
    """The seeds among the settings; those of a stack by ``slug.seed``."""
    return {name: value for name, value in trial.settings.items() if name.rpartition(".")[2] == "seed"}


def _unseeded(trial: Trial) -> dict[str, Any]:
    seeds = _seeds(trial)
    return {name: value for name, value in trial.settings.items() if name not in seeds}


def _mean_draw(draws: Sequence[Trial]) -> Trial:
    """The mean of all draws, dated as the newest."""
    newest = max(draws, key=lambda trial: (trial.started, trial.key))
    scores = {name: averaged([trial.scores[name] for trial in draws]) for name in newest.scores}
    return replace(
        newest,
        settings=_unseeded(newest),
        scores=scores,
        draws=len(draws),
        members=tuple(run for trial in draws for run in trial.runs),
    )


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
