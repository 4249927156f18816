"""What measurements say about the choice of a method: gains beside the quality kept, fronts, recommendations.

Reads the user's runs and the reference measurements alike. Every gain is oriented so that more is better (2 = twice as
fast, half the bytes), every quality is a share of the unmodified model's (1 = as good). Like ``taxonomy.queries`` this
needs the standard library only; SQLAlchemy is imported when the user's runs are kept at a database URL.
"""

from __future__ import annotations

import json
import shlex
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from taxonomy import files, paths
from taxonomy.errors import EmptyCatalogError, QueryError
from taxonomy.queries import find_facet, find_term

Goal = Literal["prefill", "decode", "memory", "compute"]

GOALS: Mapping[str, tuple[str, ...]] = {
    "prefill": ("prefill-time", "image-time"),
    "decode": ("decode-speed", "generation-speed"),
    "memory": ("weight-bytes", "kv-bytes"),
    "compute": ("flops",),
}
"""What may be wanted, and the quantities that show it, best first. FLOPs are counted; all others are realised."""

ALL_GAINS = tuple(quantity for group in GOALS.values() for quantity in group)

QUALITIES = (
    "accuracy", "retained-score", "loyalty", "retrieval", "perplexity", "agreement", "cosine-cls",
    "cosine-mean", "cosine-text", "identical-tokens", "first-token-agreement",
)  # fmt: skip
"""Quantities that say how much of the model is left, the most telling first."""

_AGAINST_DENSE = frozenset(QUALITIES) - {"accuracy", "loyalty", "retrieval", "perplexity"}
"""Measured against the unmodified model's output: the method's own figure is the share that is kept."""

_LOWER_IS_BETTER = frozenset(
    {"perplexity", "prefill-time", "image-time", "weight-bytes", "kv-bytes", "flops"}
)
FAMILY_GOALS: Mapping[str, Goal] = {"decoding": "decode", "kv-cache": "memory"}

_BUDGETS = ("sparsity", "keep_ratio")
"""Parameters that are told even at their default: every method of a family has another one."""

_SPEAK_FOR = {
    "prefill": ("shrinks_sequence", "shrinks_weights"),
    "decode": ("lossless", "shrinks_weights"),
    "memory": ("shrinks_weights", "shrinks_cache"),
    "compute": ("shrinks_sequence", "shrinks_weights"),
}
"""Properties on cards that speak for a goal, where nothing was measured."""


@dataclass(frozen=True)
class Score:
    """One quantity of a run as a ratio to the unmodified model.

    Attributes:
        quantity: id of the quantity.
        tasks: data or protocol it was measured on; several are averaged.
        parts: the value on each task.
        value: gain (more is better), or share of the quality kept.
        noise: relative uncertainty of ``value``: the spreads of both arms, each over its median, added.
        bound: the largest gain that the saved work allows, where the run states it.
        dense, method: the figures themselves, of the first task.
        unit: their unit.
    """

    quantity: str
    tasks: tuple[str, ...]
    parts: tuple[float, ...]
    value: float
    noise: float
    bound: float | None
    dense: float | None
    method: float | None
    unit: str

    @property
    def credited(self) -> float:
        """``value``, but never more than its bound: what lies above it is an error of the measurement."""
        return self.value if self.bound is None else min(self.value, self.bound)

    @property
    def real(self) -> bool:
        """Whether it is a gain at all, beyond the noise."""
        return self.credited > 1 + self.noise

    @property
    def suspect(self) -> bool:
        """Whether it lies above its bound by more than the noise (and 2%)."""
        return self.bound is not None and self.value * (1 - self.noise) > 1.02 * self.bound


@dataclass(frozen=True)
class Trial:
    """A finished run with its scores by quantity.

    ``settings`` are the parameters that set the budget and those that are not at their default.
    """

    key: str
    origin: str
    method: str
    model: str
    hardware: str
    environment: str
    device: str | None
    dtype: str | None
    protocol: str
    started: str
    config: str
    settings: Mapping[str, Any]
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def setting_text(self) -> str:
        """The settings in one line, as ``sparsity=0.3``."""
        return ", ".join(f"{name}={_plain(value)}" for name, value in self.settings.items())

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return _command(self.method, self.model, self.settings)


@dataclass(frozen=True)
class Point:
    """A trial in the plane of a front. ``best``: faster or smaller, and nothing else is at least as good in both."""

    trial: Trial
    gain: Score
    quality: Score
    best: bool


@dataclass(frozen=True)
class Front:
    """Trials that may be compared: same model, hardware, number format, data and protocol.

    ``points`` are sorted by measured gain. The unmodified model stands at gain 1 and quality 1, and takes part.
    """

    model: str
    hardware: str
    device: str | None
    dtype: str | None
    protocol: str
    gain: str
    gain_tasks: tuple[str, ...]
    quality: str
    quality_tasks: tuple[str, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Pick:
    """A recommended method.

    ``basis``: ``measured`` (on the model asked for), ``like`` (measured on another model), ``card`` (what the card
    states or its sources report; nothing was measured).
    """

    method: str
    basis: Literal["measured", "like", "card"]
    why: str
    command: str
    model: str | None = None
    gain: Score | None = None
    quality: Score | None = None
    hardware: str | None = None
    run: str | None = None


@dataclass(frozen=True)
class Recommendation:
    """The answer to "what should I use": ``reason`` says where it comes from, ``picks`` are best first."""

    model: str
    goal: str
    max_loss: float
    reason: str
    picks: tuple[Pick, ...]


# --- reading runs ---------------------------------------------------------------------------------------------


def trials(
    *,
    model: str | None = None,
    methods: Iterable[str] | None = None,
    hardware: str | None = None,
    gains: Iterable[str] = ALL_GAINS,
) -> list[Trial]:
    """Finished runs with their scores; of runs that asked for the same in the same environment, the newest.

    Args:
        model: only this model.
        methods: only runs of one of these, stacks that hold one included; ``None`` = all.
        hardware: only where this text is part of the hardware's name.
        gains: the gains that are read, besides all qualities.

    Raises:
        CatalogError: a catalogue cannot be read.
    """
    query, values = _question(model, methods, hardware, gains)
    defaults = _defaults(_rows(str(paths.catalog_file()), _DEFAULTS, {}))
    found: dict[str, Trial] = {}
    for place, origin in _places():
        found |= _assembled(_rows(place, query, values), origin, defaults)
    return _newest(found.values())


def reference_trials(db: sqlite3.Connection) -> list[Trial]:
    """The same for all reference measurements of a built catalogue."""
    query, values = _question(None, None, None, ALL_GAINS)
    return _newest(
        _assembled(db.execute(query, values), "reference", _defaults(db.execute(_DEFAULTS))).values()
    )


def _question(
    model: str | None, methods: Iterable[str] | None, hardware: str | None, gains: Iterable[str]
) -> tuple[str, dict[str, Any]]:
    """The query for all figures that scores are made of, with its bound values."""
    wanted = {*gains, *QUALITIES}
    asked = sorted(wanted | {f"{quantity}-bound" for quantity in wanted})
    values: dict[str, Any] = {f"q{index}": quantity for index, quantity in enumerate(asked)}
    conditions = ["r.status = 'done'", f"x.quantity IN ({_names('q', len(asked))})"]
    if model is not None:
        conditions.append("o.ref = :model")
        values["model"] = model
    if hardware is not None:
        conditions.append("lower(e.hardware) LIKE :hardware ESCAPE '!'")
        values["hardware"] = f"%{_literal(hardware.lower())}%"
    if methods is not None:
        chosen = sorted(set(methods))
        conditions.append(f"r.id IN (SELECT run FROM run_method WHERE slug IN ({_names('m', len(chosen))}))")
        values |= {f"m{index}": slug for index, slug in enumerate(chosen)}
    query = (
        "SELECT r.key, r.method, o.ref, e.hardware, e.digest, r.device, r.dtype, r.protocol, r.started, r.config,"
        " r.parameters, x.task, x.quantity, x.arm, x.median, x.spread, x.unit"
        " FROM run r JOIN measurement x ON x.run = r.id JOIN model o ON o.id = r.model"
        f" JOIN environment e ON e.id = r.environment WHERE {' AND '.join(conditions)}"
    )
    return query, values


def _newest(found: Iterable[Trial]) -> list[Trial]:
    """One trial for each thing that was asked for in each environment."""
    newest: dict[tuple[str, str], Trial] = {}
    for trial in sorted(found, key=lambda trial: (trial.started, trial.key)):
        newest[trial.config, trial.environment] = trial
    return list(newest.values())


def _names(letter: str, count: int) -> str:
    """``:q0, :q1``: bound values in a list; an empty list matches nothing."""
    return ", ".join(f":{letter}{index}" for index in range(count)) or "NULL"


def _literal(text: str) -> str:
    """``text`` in a LIKE pattern with ``ESCAPE '!'``."""
    return text.replace("!", "!!").replace("%", "!%").replace("_", "!_")


def _places() -> list[tuple[str, str]]:
    """Catalogues to read with their origin; a later one wins where both hold a run."""
    return [(paths.user_catalog(), "own"), (str(paths.catalog_file()), "reference")]


def _rows(place: str, query: str, values: Mapping[str, Any]) -> list[Sequence[Any]]:
    """Answer of the catalogue at ``place``; nothing when it does not exist yet."""
    if "://" in place:
        import sqlalchemy as sa

        from taxonomy.runs import reading

        with suppress(EmptyCatalogError), reading(place) as connection:
            return [tuple(row) for row in connection.execute(sa.text(query), dict(values))]
        return []
    if not Path(place).is_file():
        return []
    with suppress(EmptyCatalogError), files.plain_errors(place), closing(files.connect(Path(place))) as db:
        return db.execute(query, dict(values)).fetchall()
    return []


_DEFAULTS = 'SELECT method, name, "default" FROM parameter WHERE NOT required'


def _defaults(rows: Iterable[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Default of every parameter by method, from the answer to ``_DEFAULTS``."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for method, name, default in rows:
        found[method][name] = json.loads(default) if default is not None else None
    return found


def _assembled(
    rows: Iterable[Sequence[Any]], origin: str, defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, Trial]:
    """Trials by key, from rows in any order."""
    facts: dict[str, Sequence[Any]] = {}
    figures: dict[str, list[Sequence[Any]]] = defaultdict(list)
    for row in rows:
        facts.setdefault(row[0], row)
        figures[row[0]].append(row[11:])
    found = {}
    for key, row in facts.items():
        method, parameters = row[1], row[10]
        given = json.loads(parameters) if isinstance(parameters, str) else parameters
        changed = _changed(method, given, defaults)
        found[key] = Trial(*(key, origin, method, *row[2:10], changed, _scores(figures[key])))
    return found


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
        if name in _BUDGETS or (usual.get(name) != value and (value or usual.get(name)))
    }


def _scores(figures: Iterable[Sequence[Any]]) -> dict[str, Score]:
    """Scores by quantity from rows ``(task, quantity, arm, median, spread, unit)``."""
    arms: dict[str, dict[str, dict[str, Sequence[Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in figures:
        arms[row[1]][row[0]][row[2]] = row
    scores = {}
    for quantity, tasks in arms.items():
        values = {task: _value(quantity, found) for task, found in sorted(tasks.items())}
        known = {task: value for task, value in values.items() if value is not None}
        if quantity.endswith("-bound") or not known:
            continue
        bounds = [
            found["ratio"][3] for found in arms.get(f"{quantity}-bound", {}).values() if "ratio" in found
        ]
        first = tasks[next(iter(known))]
        scores[quantity] = Score(
            quantity=quantity,
            tasks=tuple(known),
            parts=tuple(known.values()),
            value=sum(known.values()) / len(known),
            noise=max(sum((row[4] or 0.0) / row[3] for arm, row in tasks[task].items() if row[3]) for task in known),
            bound=sum(bounds) / len(bounds) if bounds else None,
            dense=first["dense"][3] if "dense" in first else None,
            method=first["method"][3] if "method" in first else None,
            unit=next((first[arm][5] for arm in ("method", "dense") if arm in first), "1"),
        )  # fmt: skip
    return scores


def _value(quantity: str, arms: Mapping[str, Sequence[Any]]) -> float | None:
    """The oriented ratio of one quantity on one task, or ``None`` when it cannot be formed."""
    if "ratio" in arms:
        return float(arms["ratio"][3])
    if quantity in _AGAINST_DENSE and "method" in arms:
        return float(arms["method"][3])
    if "dense" not in arms or "method" not in arms:
        return None
    upper, lower = (
        ("dense", "method") if quantity in _LOWER_IS_BETTER else ("method", "dense")
    )  # which arm stands above the fraction line
    return float(arms[upper][3] / arms[lower][3]) if arms[lower][3] > 0 else None


# --- fronts ---------------------------------------------------------------------------------------------------


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
    goals = [_goal(goal)] if goal else goals_of(family)
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
        condition = f" AND r.id IN (SELECT run FROM run_method WHERE slug IN ({_names('m', len(methods))}))"
        values = {f"m{index}": slug for index, slug in enumerate(methods)}
    query = (
        "SELECT o.ref, count(*) FROM run r JOIN model o ON o.id = r.model"
        f" WHERE r.status = 'done'{condition} GROUP BY o.ref"
    )
    counts: Counter[str] = Counter()
    for place, _ in _places():
        counts.update(dict(tuple(row) for row in _rows(place, query, values)))
    return min(counts, key=lambda ref: (-counts[ref], ref)) if counts else None


def fronts(
    found: Sequence[Trial], gains: Sequence[str] = GOALS["prefill"], qualities: Sequence[str] = QUALITIES
) -> list[Front]:
    """Group trials that may be compared and mark the best of each group; the largest group comes first."""
    groups: dict[tuple[Any, ...], list[tuple[Trial, Score, Score]]] = defaultdict(list)
    by_setting: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for trial in found:
        by_setting[trial.model, trial.hardware, trial.device, trial.dtype, trial.protocol].append(trial)
    for setting, members in by_setting.items():
        gain, quality = _usual(members, gains), _usual(members, qualities)
        for trial in members:
            if gain in trial.scores and quality in trial.scores:
                speed, kept = trial.scores[gain], trial.scores[quality]
                group = (*setting, gain, speed.tasks, quality, kept.tasks)
                groups[group].append((trial, speed, kept))
    made = [Front(*(*group, _points(members))) for group, members in groups.items()]
    return sorted(
        made, key=lambda front: (-len(front.points), front.model, front.hardware, front.quality_tasks)
    )


def _usual(found: Sequence[Trial], names: Sequence[str]) -> str:
    """The first of ``names`` that at least half as many trials have as the most frequent one."""
    counts = {name: sum(name in trial.scores for trial in found) for name in names}
    return next(name for name in names if 2 * counts[name] >= max(counts.values()))


def _points(members: Sequence[tuple[Trial, Score, Score]]) -> tuple[Point, ...]:
    """Points by rising gain, with the best marked: one sweep from the largest gain down."""
    ordered = sorted(members, key=lambda m: (-m[1].credited, -m[2].value, m[0].method, m[0].key))
    highest, points = float("-inf"), []
    for trial, gain, quality in ordered:
        # Without a real gain the unmodified model is as good a choice.
        points.append(Point(trial, gain, quality, best=gain.real and quality.value > highest))
        highest = max(highest, quality.value)
    return tuple(sorted(points, key=lambda point: (point.gain.value, point.trial.method, point.trial.key)))


# --- recommendations ------------------------------------------------------------------------------------------


def parse_share(text: str) -> float:
    """``2%`` or ``0.02``; raises ``QueryError`` unless it lies between 0 and 1."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if rest.strip() or not 0 <= share < 1:
        raise QueryError(f"'{text}' is not a share; write 2% or 0.02")
    return share


def recommend(
    db: sqlite3.Connection, model: str, goal: str, max_loss: float, *, most: int = 5
) -> Recommendation:
    """Methods for ``goal`` that keep at least ``1 - max_loss`` of the quality, best gain first.

    What was measured on ``model`` answers; failing that, what was measured on models of the same architecture, or on
    any other; failing that, what cards state. Each pick says which of these it rests on.

    Raises:
        QueryError: unknown goal.
    """
    gains = GOALS[_goal(goal)]
    label = f"{goal} gain with at most {100 * max_loss:.3g}% of the quality lost"
    here = trials(model=model, gains=gains)
    picks = _best_of(here, gains, max_loss, model, most)
    if picks:
        return Recommendation(model, goal, max_loss, f"Measured on {model}: {label}.", tuple(picks))
    if here:
        start = f"{counted(len(here), 'run')} on {model}, and none shows a {label}"
    else:
        start = f"Nothing was measured on {model}"
    others, what = _like(model)
    like = [trial for other in others for trial in trials(model=other, gains=gains)]
    picks = _best_of(like, gains, max_loss, model, most)
    if picks:
        reason = (
            f"{start}. These were measured on {what}; on {model} they may do otherwise, so measure first."
        )
        return Recommendation(model, goal, max_loss, reason, tuple(picks))
    reason = f"{start}; nothing measured on other models answers either. By their cards these aim at it."
    return Recommendation(model, goal, max_loss, reason, tuple(_by_card(db, goal, max_loss, model, most)))


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _goal(name: str) -> str:
    if name not in GOALS:
        raise QueryError(f"there is no goal '{name}'; known: {', '.join(GOALS)}")
    return name


def _best_of(
    found: Sequence[Trial], gains: Sequence[str], max_loss: float, model: str, most: int
) -> list[Pick]:
    """The best trial of each method that gains more than its noise and keeps enough, by gain."""
    best: dict[str, tuple[float, Pick]] = {}
    for trial in found:
        quality = next((trial.scores[name] for name in QUALITIES if name in trial.scores), None)
        gain = max(
            (trial.scores[name] for name in gains if name in trial.scores), key=_credited, default=None
        )
        if quality is None or gain is None or quality.value < 1 - max_loss or not gain.real:
            continue
        if trial.method not in best or gain.credited > best[trial.method][0]:
            like = "" if trial.model == model else f" on {trial.model}"
            share = (
                f"{quality.value:.1%} of {quality.quantity} kept"
                if quality.value < 1
                else f"no loss in {quality.quantity}"
            )
            doubt = ", so it counts as that" if gain.suspect else ""
            limit = f" (the saved work allows {gain.bound:.2f}×{doubt})" if gain.bound else ""
            why = f"{gain.value:.2f}× {gain.quantity}{limit}, {share}{like}"
            pick = Pick(
                trial.method, "like" if like else "measured", why, _command(trial.method, model, trial.settings),
                trial.model, gain, quality, trial.hardware, trial.key,
            )  # fmt: skip
            best[trial.method] = (gain.credited, pick)
    ordered = sorted(best.values(), key=lambda entry: (-entry[0], entry[1].method))
    return [pick for _, pick in ordered[:most]]


def _credited(score: Score) -> float:
    return score.credited


MOST_LIKE = 3
"""Other models that are looked at, those measured most."""


def _like(model: str) -> tuple[list[str], str]:
    """Measured models that are like ``model``, and in words what they have in common with it."""
    query = (
        "SELECT o.ref, o.facts, (SELECT count(*) FROM run WHERE run.model = o.id AND run.status = 'done') AS done"
        " FROM model o"
    )
    known: dict[str, str] = {}
    runs: Counter[str] = Counter()
    for place, _ in _places():
        for ref, facts, done in _rows(place, query, {}):
            known[ref] = str((json.loads(facts) if isinstance(facts, str) else facts).get("architecture", ""))
            runs[ref] += done
    own = known.pop(model, None) or _architecture(model, set(known.values()))
    measured = sorted((ref for ref in known if runs[ref]), key=lambda ref: (-runs[ref], ref))
    alike = [ref for ref in measured if own and known[ref] == own]
    if alike:
        return alike[:MOST_LIKE], f"other models of the same architecture ({own})"
    return measured[:MOST_LIKE], "models of other architectures"


def _architecture(model: str, known: Iterable[str]) -> str | None:
    """Architecture of a folder by its configuration, else the longest known name that occurs in the reference."""
    config = Path(model).expanduser() / "config.json"
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    named = [
        name for name in known if name and name.lower().replace("_", "") in model.lower().replace("-", "")
    ]
    return max(named, key=len, default=None)


def _by_card(db: sqlite3.Connection, goal: str, max_loss: float, model: str, most: int) -> list[Pick]:
    """Implemented methods whose card states what serves the goal; those with figures read in a source come first."""
    properties = _SPEAK_FOR[goal]
    lossless = " AND m.slug IN (SELECT method FROM method_property WHERE property = 'lossless' AND value)"
    query = (
        "SELECT m.slug, (SELECT count(*) FROM claim c WHERE c.method = m.slug AND c.verified) AS read"
        " FROM method m WHERE m.implemented AND m.kind = 'method' AND m.slug IN (SELECT method FROM method_property"
        f" WHERE value AND property IN (:p0, :p1)){lossless if max_loss == 0 else ''}"
        " ORDER BY read DESC, m.slug LIMIT :most"
    )
    values = {"p0": properties[0], "p1": properties[1], "most": most}
    return [
        Pick(slug, "card", _card_reason(db, slug, properties), _command(slug, model, {}))
        for slug, _ in db.execute(query, values)
    ]


def _card_reason(db: sqlite3.Connection, slug: str, properties: Sequence[str]) -> str:
    stated = [
        row[0].replace("_", " ")
        for row in db.execute(
            "SELECT property FROM method_property WHERE method = ? AND value AND property IN (?, ?)",
            (slug, *properties),
        )
    ]
    claim = db.execute(
        "SELECT metric, value, model, source FROM claim WHERE method = ? AND verified ORDER BY position LIMIT 1",
        (slug,),
    ).fetchone()
    source = f" ({claim[3]})" if claim and claim[3] else ""
    reported = f"; reported: {claim[0]} {claim[1]} on {claim[2]}{source}" if claim else ""
    return f"the card says it {' and '.join(stated)}{reported}".replace(
        "says it lossless", "says it is lossless"
    )


def _command(method: str, model: str, settings: Mapping[str, Any]) -> str:
    words = ["zoo", "run", method, "--model", model]
    for name, value in settings.items():
        words += ["--set", f"{name}={_plain(value)}"]
    return shlex.join(words)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
