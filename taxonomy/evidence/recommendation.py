"""What to use on a model: by measurements on it, on models like it, or by cards."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from taxonomy import paths
from taxonomy.errors import QueryError
from taxonomy.evidence.asking import answers_of
from taxonomy.evidence.front import checked_goal
from taxonomy.evidence.point import PROOF, proofs_of, proven_by
from taxonomy.evidence.pooling import over_draws
from taxonomy.evidence.reading import trials
from taxonomy.evidence.trial import Trial, command_of
from taxonomy.scores import GOALS, QUALITIES, Score


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
    gains = GOALS[checked_goal(goal)]
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


def _best_of(
    found: Sequence[Trial], gains: Sequence[str], max_loss: float, model: str, most: int
) -> list[Pick]:
    """The best trial of each method that gains more than its noise and keeps enough, by gain.

    Where a method was measured on several tasks at once, one friendly prompt says nothing any more.
    """
    measured = []
    widest: Counter[str] = Counter()
    for trial in over_draws(found):
        quality = next((trial.scores[name] for name in QUALITIES if name in trial.scores), None)
        gain = max(
            (trial.scores[name] for name in gains if name in trial.scores), key=_credited, default=None
        )
        if quality is not None and gain is not None:
            measured.append((trial, gain, quality))
            widest[trial.method] = max(widest[trial.method], len(gain.tasks))
    best: dict[str, tuple[float, Pick]] = {}
    proofs = proofs_of(found)
    for trial, gain, quality in measured:
        if not gain.real or len(gain.tasks) < widest[trial.method]:
            continue
        proof = proofs.get(proven_by(trial))
        proven = None if proof is None else proof.scores[PROOF]
        if min(score.value for score in (quality, proven) if score is not None) < 1 - max_loss:
            continue
        if trial.method not in best or gain.credited > best[trial.method][0]:
            like = "" if trial.model == model else f" on {trial.model}"
            why = f"{_told(gain)}, {_share(quality, proven)}{like}"
            pick = Pick(
                trial.method, "like" if like else "measured", why, command_of(trial.method, model, trial.settings),
                trial.model, gain, quality, trial.hardware, trial.key,
            )  # fmt: skip
            best[trial.method] = (gain.credited, pick)
    ordered = sorted(best.values(), key=lambda entry: (-entry[0], entry[1].method))
    return [pick for _, pick in ordered[:most]]


def _told(gain: Score) -> str:
    """A gain with its bound, and where it comes from when it was measured on several tasks."""
    doubt = ", so it counts as that" if gain.suspect else ""
    limit = f" (the saved work allows {gain.bound:.2f}×{doubt})" if gain.bound else ""
    text = f"{gain.value:.2f}× {gain.quantity}{limit}"
    if len(gain.tasks) == 1:
        return text
    ordered = sorted(zip(gain.parts, gain.tasks, strict=True))
    (low, worst), (high, best) = ordered[0], ordered[-1]
    return f"{text} over {len(ordered)} tasks, from {low:.2f}× ({worst}) to {high:.2f}× ({best})"


def _share(quality: Score, proven: Score | None) -> str:
    """How much is kept, and how many outputs of a proof are those of the unmodified model."""
    kept = (
        f"{quality.value:.1%} of {quality.quantity} kept"
        if quality.value < 1
        else f"no loss in {quality.quantity}"
    )
    if proven is None:
        return kept
    return f"{kept}; {proven.method:.0f} of {proven.dense:.0f} outputs compared one by one are the same"


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
        for ref, facts, done in answers_of(place, [(query, {})])[0]:
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


_SPEAK_FOR = {
    "prefill": ("shrinks_sequence", "shrinks_weights"),
    "decode": ("lossless", "shrinks_weights"),
    "memory": ("shrinks_weights", "shrinks_cache"),
    "compute": ("shrinks_sequence", "shrinks_weights"),
}
"""Properties on cards that speak for a goal, where nothing was measured."""


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
        Pick(slug, "card", _card_reason(db, slug, properties), command_of(slug, model, {}))
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
