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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from taxonomy import files, paths
from taxonomy.errors import EmptyCatalogError, QueryError
from taxonomy.queries import find_facet, find_term
from taxonomy.scores import ALL_GAINS, GOALS, QUALITIES, SCORED, Goal, Score, scores_of

__all__ = [
    "ALL_GAINS", "GOALS", "QUALITIES", "Front", "Pick", "Point", "Recommendation", "Score", "Trial", "counted",
    "fronts", "goals_of", "most_measured", "pareto", "parse_share", "recommend", "reference_trials", "trials",
]  # fmt: skip

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


@dataclass(frozen=True, slots=True)
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
    shipped, wanted = str(paths.catalog_file()), {*gains, *QUALITIES}
    bounds = {f"{quantity}-bound" for quantity in wanted}
    chosen = _chosen(model, methods, hardware)
    own = _answers(paths.user_catalog(), _questions("measurement", wanted | bounds, chosen))
    *stored, given = _answers(shipped, [*_questions("score", wanted, chosen), (_DEFAULTS, {})])
    defaults = _defaults(given)
    found = _assembled(own, "own", scores_of, defaults)
    found |= _assembled(stored, "reference", _stored, defaults)  # where both hold a run it is a reference run
    return _newest(found.values())


def reference_trials(db: sqlite3.Connection) -> list[Trial]:
    """The same for all reference measurements of a built catalogue."""
    asked = _questions("score", SCORED, _chosen())
    answers = [db.execute(query, values).fetchall() for query, values in asked]
    return _newest(_assembled(answers, "reference", _stored, _defaults(db.execute(_DEFAULTS))).values())


Question = tuple[str, Mapping[str, Any]]
"""A query with its bound values."""

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
        texts.append(f"{run} IN (SELECT run FROM run_method WHERE slug IN ({_names('m', len(slugs))}))")
        values |= {f"m{index}": slug for index, slug in enumerate(slugs)}
    return texts, values


_FACTS = (
    "SELECT r.id, r.key, r.method, o.ref, e.hardware, e.digest, r.device, r.dtype, r.protocol, r.started, r.config,"
    " r.parameters"
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
    figures = (
        f"{_FIGURES[table]} WHERE x.quantity IN ({_names('q', len(asked))}) AND x.run IN (SELECT r.id {runs})"
    )
    return [(f"{_FACTS} {runs}", values), (figures, {**values, **asked})]


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


def _answers(place: str, questions: Sequence[Question]) -> list[list[Sequence[Any]]]:
    """Answers of the catalogue at ``place``; nothing to each question when it does not exist yet."""
    if "://" in place:
        import sqlalchemy as sa

        from taxonomy.runs import reading

        with suppress(EmptyCatalogError), reading(place) as connection:
            return [
                [tuple(row) for row in connection.execute(sa.text(query), dict(values))]
                for query, values in questions
            ]
    elif Path(place).is_file():
        with (
            suppress(EmptyCatalogError),
            files.plain_errors(place),
            closing(files.connect(Path(place))) as db,
        ):
            return [db.execute(query, dict(values)).fetchall() for query, values in questions]
    return [[] for _ in questions]


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
    for number, key, method, *rest, parameters in facts:
        scored = scores(figures[number]) if number in figures else None
        if scored:
            given = json.loads(parameters) if isinstance(parameters, str) else parameters
            settings = _changed(method, given, defaults)
            found[key] = Trial(*(key, origin, method, *rest, settings, scored))
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
        if name in _BUDGETS or (usual.get(name) != value and (value or usual.get(name)))
    }


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
    for place in (paths.user_catalog(), str(paths.catalog_file())):
        (rows,) = _answers(place, [(query, values)])
        for ref, runs in rows:
            counts[ref] += runs
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
    like: list[Trial] = []
    for other in others:
        like += trials(model=other, gains=gains)
        picks = _best_of(like, gains, max_loss, model, most)
        if len(picks) >= most:
            break
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
"""Other models that are looked at while there are too few picks, those measured most first."""


def _like(model: str) -> tuple[list[str], str]:
    """Measured models that are like ``model``, and in words what they have in common with it."""
    own_runs = (
        "SELECT o.ref, o.facts, count(r.id) FROM model o LEFT JOIN run r ON r.model = o.id AND r.status = 'done'"
        " GROUP BY o.id"
    )
    known: dict[str, str] = {}
    runs: Counter[str] = Counter()
    for place, query in (
        (paths.user_catalog(), own_runs),
        (
            str(paths.catalog_file()),
            "SELECT o.ref, o.facts, u.runs FROM model o JOIN model_use u ON u.model = o.id",
        ),
    ):
        for ref, facts, done in _answers(place, [(query, {})])[0]:
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
