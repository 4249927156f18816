"""What the figures of one run say against the unmodified model: each gain and each quality as one number.

Every gain is oriented so that more is better (2 = twice as fast, half the bytes), every quality is a share of the
unmodified model's (1 = as good). The build of the catalogue stores the scores of the reference runs; those of the
user's runs are worked out when they are asked for. Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

SCORED = frozenset({*ALL_GAINS, *QUALITIES})
"""Quantities that have a score."""

_AGAINST_DENSE = frozenset(QUALITIES) - {"accuracy", "loyalty", "retrieval", "perplexity"}
"""Measured against the unmodified model's output: the method's own figure is the share that is kept."""

_LOWER_IS_BETTER = frozenset(
    {"perplexity", "prefill-time", "image-time", "weight-bytes", "kv-bytes", "flops"}
)


@dataclass(frozen=True, slots=True)
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


def scores_of(figures: Iterable[Sequence[Any]]) -> dict[str, Score]:
    """Scores by quantity from rows ``(task, quantity, arm, median, spread, unit)`` of one run."""
    arms: dict[str, dict[str, dict[str, Sequence[Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in figures:
        arms[row[1]][row[0]][row[2]] = row
    scores = {}
    for quantity in sorted(SCORED & arms.keys()):
        tasks = arms[quantity]
        values = {task: _value(quantity, tasks[task]) for task in sorted(tasks)}
        known = {task: value for task, value in values.items() if value is not None}
        if not known:
            continue
        limits = arms.get(f"{quantity}-bound", {}).values()
        bounds = [found["ratio"][3] for found in limits if "ratio" in found]
        first = tasks[next(iter(known))]
        scores[quantity] = Score(
            quantity=quantity,
            tasks=tuple(known),
            parts=tuple(known.values()),
            value=sum(known.values()) / len(known),
            noise=max(_noise(tasks[task].values()) for task in known),
            bound=sum(bounds) / len(bounds) if bounds else None,
            dense=first["dense"][3] if "dense" in first else None,
            method=first["method"][3] if "method" in first else None,
            unit=next((first[arm][5] for arm in ("method", "dense") if arm in first), "1"),
        )
    return scores


def _noise(arms: Iterable[Sequence[Any]]) -> float:
    """The spreads of all arms, each over its median, added."""
    return sum((row[4] or 0.0) / row[3] for row in arms if row[3])


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
