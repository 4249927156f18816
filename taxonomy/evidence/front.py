"""Gains beside the quality kept: which trials are the best choices."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from taxonomy import paths
from taxonomy.errors import QueryError
from taxonomy.evidence.asking import answers_of, bound_names
from taxonomy.evidence.point import Front, Point, Setting, proofs_of, proven_by
from taxonomy.evidence.pooling import over_draws
from taxonomy.evidence.reading import trials
from taxonomy.evidence.trial import Trial
from taxonomy.queries import find_facet, find_term
from taxonomy.scores import GOALS, QUALITIES, Goal, Score

FAMILY_GOALS: Mapping[str, Goal] = {"decoding": "decode", "kv-cache": "memory"}


def pareto(
    db: sqlite3.Connection,
    *,
    family: str | None = None,
    model: str | None = None,
    hardware: str | None = None,
    goal: str | None = None,
    quality: str | None = None,
) -> list[Front]:
    """Fronts of a model (the one that was measured most, by default), the largest first.

    Args:
        db: connection from ``open_catalog``, which knows which method is of which family.
        family: only methods of this family, and stacks that hold one.
        model: reference of the model.
        hardware: part of the name of the hardware.
        goal: what the gain is, one of ``GOALS``; ``None`` = what suits the family, else what was measured.
        quality: a quantity of ``QUALITIES``; ``None`` = the most telling one that most runs have.

    Raises:
        QueryError: unknown family, goal or quality.
    """
    methods = None
    if family is not None:
        family = find_term(find_facet("family"), family)
        methods = [slug for (slug,) in db.execute("SELECT slug FROM method WHERE family = ?", (family,))]
    goals = [checked_goal(goal)] if goal else goals_of(family)
    if quality is not None and quality not in QUALITIES:
        raise QueryError(f"there is no quality '{quality}'; known: {', '.join(QUALITIES)}")
    model = model or most_measured(methods)
    if model is None:
        return []
    for name in goals:
        found = trials(model=model, methods=methods, hardware=hardware, gains=GOALS[name])
        drawn = fronts(found, GOALS[name], [quality] if quality else QUALITIES)
        if drawn:
            return drawn
    return []


def goals_of(family: str | None) -> list[str]:
    """All goals, the one that suits the family first."""
    return list(dict.fromkeys([FAMILY_GOALS.get(family or "", "prefill"), *GOALS]))


def most_measured(methods: Sequence[str] | None = None) -> str | None:
    """The model with most finished runs (of ``methods``), or ``None``."""
    condition, values = "", {}
    if methods is not None:
        condition = (
            f" AND r.id IN (SELECT run FROM run_method WHERE slug IN ({bound_names('m', len(methods))}))"
        )
        values = {f"m{index}": slug for index, slug in enumerate(methods)}
    query = (
        "SELECT o.ref, count(*) FROM run r JOIN model o ON o.id = r.model"
        f" WHERE r.status = 'done'{condition} GROUP BY o.ref"
    )
    counts: Counter[str] = Counter()
    for place in (paths.user_catalog(), str(paths.catalog_file())):
        (rows,) = answers_of(place, [(query, values)])
        for ref, runs in rows:
            counts[ref] += runs
    return min(counts, key=lambda ref: (-counts[ref], ref)) if counts else None


def fronts(
    found: Sequence[Trial], gains: Sequence[str] = GOALS["prefill"], qualities: Sequence[str] = QUALITIES
) -> list[Front]:
    """Group trials that may be compared and mark the best of each group; the largest group comes first."""
    groups: dict[tuple[Any, ...], list[tuple[Trial, Score, Score]]] = defaultdict(list)
    by_setting: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for trial in over_draws(found):
        by_setting[trial.model, trial.hardware, trial.device, trial.dtype, trial.protocol].append(trial)
    proofs = proofs_of(found)
    for setting, members in by_setting.items():
        gain, quality = _usual(members, gains), _usual(members, qualities)
        for trial in members:
            if gain in trial.scores and quality in trial.scores:
                speed, kept = trial.scores[gain], trial.scores[quality]
                group = (*setting, gain, speed.tasks, quality, kept.tasks)
                groups[group].append((trial, speed, kept))
    made = [Front(*(*group, _points(members, proofs))) for group, members in groups.items()]
    return sorted(
        made, key=lambda front: (-len(front.points), front.model, front.hardware, front.quality_tasks)
    )


def _usual(found: Sequence[Trial], names: Sequence[str]) -> str:
    """The first of ``names`` that at least half as many trials have as the most frequent one."""
    scored = Counter(chain.from_iterable(trial.scores for trial in found))
    counts = {name: scored[name] for name in names}
    return next(name for name in names if 2 * counts[name] >= max(counts.values()))


def _points(
    members: Sequence[tuple[Trial, Score, Score]], proofs: Mapping[Setting, Trial]
) -> tuple[Point, ...]:
    """Points by rising gain, with the best marked: one sweep from the largest gain down."""
    ordered = sorted(members, key=lambda m: (-m[1].credited, -m[2].value, m[0].method, m[0].key))
    highest, points = float("-inf"), []
    for trial, gain, quality in ordered:
        # Without a real gain the unmodified model is as good a choice.
        best = gain.real and quality.value > highest
        points.append(Point(trial, gain, quality, best, proofs.get(proven_by(trial))))
        highest = max(highest, quality.value)
    return tuple(sorted(points, key=lambda point: (point.gain.value, point.trial.method, point.trial.key)))


def checked_goal(name: str) -> str:
    """``name`` when it is one of ``GOALS``; else raises ``QueryError``."""
    if name not in GOALS:
        raise QueryError(f"there is no goal '{name}'; known: {', '.join(GOALS)}")
    return name
