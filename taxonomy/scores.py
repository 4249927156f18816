"""What the figures of one run say against the unmodified model: each gain and each quality as one number.

Every gain is oriented so that more is better (2 = twice as fast, half the bytes), every quality is a share of the
unmodified model's (1 = as good). The build of the catalogue stores the scores of the reference runs; those of the
user's runs are worked out when they are asked for. Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
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
    "cosine-mean", "cosine-text", "identical-outputs", "identical-tokens", "first-token-agreement",
)  # fmt: skip
"""Quantities that say how much of the model is left, the most telling first."""

COUNTED = ("tokens-per-step",)
"""Counted beside a gain, and explaining it: tokens that one pass of the model commits. Plain decoding has 1."""

SELECTION = "selection-time"
"""Time that choosing what to keep takes; its score is the share of the method's own prefill."""

SCORED = frozenset({*ALL_GAINS, *QUALITIES, *COUNTED, SELECTION})
"""Quantities that have a score."""

HELPING = frozenset({"noise", "prompts"})
"""Quantities that scores of others are worked out with, besides their bounds: by how much two plain runs differ on a
task, and of how many prompts outputs were compared."""

_AGAINST_DENSE = frozenset({*QUALITIES, *COUNTED}) - {"accuracy", "retrieval", "perplexity"}
"""Measured against the unmodified model's output: the method's own figure is the share that is kept."""

_TIMED = frozenset({*GOALS["prefill"], *GOALS["decode"]})

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
        value: gain (more is better), or share of the quality kept. Over several tasks a gain is the harmonic mean:
            that of a load whose tasks take the unmodified model equally long.
        noise: relative uncertainty of ``value``, the largest of its tasks: the spreads of both arms, each over its
            median, added; or by how much two runs of the unmodified model differed, where the run states that.
        bound: the largest gain that the saved work allows, where the run states it.
        dense, method: the figures themselves, of the first task. Of outputs that were counted: how many there were,
            and how many of them are the unmodified model's.
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
    def counted(self) -> bool:
        """Whether it is a share of outputs that were counted one by one."""
        return self.unit == "outputs"

    def beyond_noise(self, part: float) -> float:
        """``part``, or 1 where it lies no further from 1 than the noise: no gain and no loss."""
        return part if abs(part - 1) > self.noise else 1.0

    @property
    def suspect(self) -> bool:
        """Whether it lies above its bound by more than the noise (and 2%)."""
        return self.bound is not None and self.value * (1 - self.noise) > 1.02 * self.bound


def scores_of(figures: Iterable[Sequence[Any]]) -> dict[str, Score]:
    """Scores by quantity from rows ``(task, quantity, arm, median, spread, unit)`` of one run."""
    arms: dict[str, dict[str, dict[str, Sequence[Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in figures:
        arms[row[1]][row[0]][row[2]] = row
    _set_totals(arms.get("identical-outputs", {}), arms.get("prompts", {}))
    _set_share(arms.get(SELECTION, {}), arms.get("prefill-time", {}))
    apart = {task: found["dense"][3] for task, found in arms.get("noise", {}).items() if "dense" in found}
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
            value=_mean(quantity, list(known.values())),
            noise=max(_noise(quantity, tasks[task].values(), apart.get(task, 0.0)) for task in known),
            bound=_mean(quantity, bounds) if bounds else None,
            dense=first["dense"][3] if "dense" in first else None,
            method=first["method"][3] if "method" in first else None,
            unit=next((first[arm][5] for arm in ("method", "dense") if arm in first), "1"),
        )
    return scores


def _set_share(selection: Mapping[str, dict[str, Any]], prefill: Mapping[str, Mapping[str, Any]]) -> None:
    """Put beside the time of a selection that of the whole prefill, which it is a share of."""
    for task, arms in selection.items():
        whole = prefill.get(task, {}).get("method")
        if "method" in arms and whole is not None:
            arms["dense"] = whole


def _set_totals(outputs: Mapping[str, dict[str, Any]], prompts: Mapping[str, Mapping[str, Any]]) -> None:
    """Put beside a count of outputs how many there were; a count without its total says nothing and is taken out."""
    for task, arms in outputs.items():
        if "method" in arms and arms["method"][5] == "outputs":
            if "method" in prompts.get(task, {}):
                arms["dense"] = prompts[task]["method"]
            else:
                del arms["method"]


def pooled(scores: Sequence[Score]) -> Score:
    """One score of what was measured task by task, each task in a run of its own.

    Its figures are the means over the tasks where they are shares, else those of the first task.
    """
    first = scores[0]
    parts = tuple(part for score in scores for part in score.parts)
    bounds = [score.bound for score in scores if score.bound is not None]
    dense, method = (
        [value for score in scores if (value := getattr(score, arm)) is not None]
        for arm in ("dense", "method")
    )
    shares = first.unit == "1" and len(dense) == len(method) == len(scores)
    return replace(
        first,
        dense=fmean(dense) if shares else first.dense,
        method=fmean(method) if shares else first.method,
        tasks=tuple(task for score in scores for task in score.tasks),
        parts=parts,
        value=_mean(first.quantity, parts),
        noise=max(score.noise for score in scores),
        bound=_mean(first.quantity, bounds) if len(bounds) == len(scores) else None,
    )


def averaged(scores: Sequence[Score]) -> Score:
    """One score of several draws on the same tasks: the mean of each part and figure, and at least their own spread."""
    values = sorted(score.value for score in scores)
    mean = fmean(values)
    bounds = [score.bound for score in scores if score.bound is not None]
    dense, method = ([getattr(score, arm) for score in scores] for arm in ("dense", "method"))
    spread = (values[-1] - values[0]) / 2 / mean if mean > 0 else 0.0
    return replace(
        scores[0],
        parts=tuple(map(fmean, zip(*(score.parts for score in scores), strict=True))),
        value=mean,
        noise=max(spread, *(score.noise for score in scores)),
        bound=fmean(bounds) if len(bounds) == len(scores) else None,
        dense=None if None in dense else fmean(dense),
        method=None if None in method else fmean(method),
    )


def _mean(quantity: str, values: Sequence[float]) -> float:
    """Of shares the arithmetic mean, of ratios of speed or size the harmonic one."""
    if len(values) == 1:
        return values[0]
    if quantity in QUALITIES or min(values) <= 0:
        return fmean(values)
    return len(values) / sum([1 / value for value in values])


def _noise(quantity: str, arms: Iterable[Sequence[Any]], apart: float) -> float:
    """The spreads of all arms, each over its median, added; of speeds at least how far ``apart`` plain runs are."""
    spreads = sum((row[4] or 0.0) / row[3] for row in arms if row[3])
    return max(spreads, apart) if quantity in _TIMED else spreads


def _value(quantity: str, arms: Mapping[str, Sequence[Any]]) -> float | None:
    """The oriented ratio of one quantity on one task, or ``None`` when it cannot be formed."""
    if "ratio" in arms:
        return float(arms["ratio"][3])
    if quantity in _AGAINST_DENSE and "method" in arms and "dense" not in arms:
        return float(arms["method"][3])
    if "dense" not in arms or "method" not in arms:
        return None
    upper, lower = (
        ("dense", "method") if quantity in _LOWER_IS_BETTER else ("method", "dense")
    )  # which arm stands above the fraction line
    return float(arms[upper][3] / arms[lower][3]) if arms[lower][3] > 0 else None
