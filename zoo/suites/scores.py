"""The score of a dataset, and what a method keeps over the datasets of a suite.

UniPruneBench (2511.02650) averages scores between 0 and 100; EffiVLM-Bench (2506.00479) looks at ratios to the
unmodified model's scores. Both are told for every suite, with the least ratio and the mean without it, since one broken
dataset moves every average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field

from zoo.bench.record import Comparison
from zoo.bench.retention import Retention, retention, unevenness
from zoo.errors import BadInput
from zoo.suites.answers import said_yes
from zoo.suites.rows import Question
from zoo.suites.tables import Dataset


def dataset_score(questions: Sequence[Question], said: Sequence[str], credit: Sequence[float]) -> float:
    """The score of a dataset by its own rule, in ``[0, 1]``.

    Args:
        questions: at least one, all of one dataset.
        said: what the answers say.
        credit: what they are worth.
    """
    dataset = questions[0].dataset
    if dataset.measure == "f1":
        return _f1([question.expected[0] for question in questions], said)
    classes: dict[Hashable, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        classes[question.key((dataset.per,)) if dataset.per else ()].append(place)
    return fmean(_class_score(dataset, questions, credit, places) for places in classes.values())


def _class_score(
    dataset: Dataset, questions: Sequence[Question], credit: Sequence[float], places: Sequence[int]
) -> float:
    """Mean of the single questions' credit and, per grouping, of the groups in which every answer is right."""
    parts = [fmean(credit[place] for place in places)] if dataset.single or not dataset.groups else []
    for columns in dataset.groups:
        groups: dict[Hashable, list[float]] = defaultdict(list)
        for place in places:
            groups[questions[place].key(columns)].append(credit[place])
        parts.append(fmean(min(group) for group in groups.values()))
    return fmean(parts)


def _f1(expected: Sequence[str], said: Sequence[str]) -> float:
    """F1 of the answer yes; 0 when nobody says it."""
    right = sum(said_yes(one) == answer == "yes" for one, answer in zip(expected, said, strict=True))
    claimed, true = said.count("yes"), sum(said_yes(one) == "yes" for one in expected)
    return 2 * right / (claimed + true) if claimed + true else 0.0


class Speed(BaseModel):
    """Prefill in ms, and decoding in tokens/s, where they were timed."""

    model_config = ConfigDict(frozen=True)

    prefill: float
    decode: float | None = None


class DatasetResult(BaseModel):
    """What one dataset gave, as its comparisons tell it; scores between 0 and 1."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    ability: str
    questions: int
    dense: float
    method: float | None = None
    loyalty: float | None = None
    dense_speed: Speed | None = None
    method_speed: Speed | None = None

    @property
    def ratio(self) -> float | None:
        """Score over the unmodified model's."""
        return None if self.method is None or not self.dense else self.method / self.dense


def result_of(dataset: Dataset, comparisons: Sequence[Comparison]) -> DatasetResult:
    """The result that comparisons of the task ``benchmark`` tell."""
    rows = {row.quantity: row for row in comparisons}
    score = rows.get("benchmark-score") or rows["accuracy"]
    assert score.dense is not None, "the unmodified model is always asked"
    same = rows["loyalty"].method if "loyalty" in rows else None
    speeds: dict[str, Speed | None] = {"dense": None, "method": None}
    if "prefill-time" in rows:
        for arm in speeds:
            prefill = getattr(rows["prefill-time"], arm)
            decode = getattr(rows["decode-speed"], arm) if "decode-speed" in rows else None
            speeds[arm] = Speed(prefill=prefill.median, decode=None if decode is None else decode.median)
    return DatasetResult(
        dataset=dataset.name,
        ability=dataset.ability,
        questions=rows["accuracy"].dense.n
        if "accuracy" in rows and rows["accuracy"].dense
        else score.dense.n,
        dense=score.dense.median,
        method=None if score.method is None else score.method.median,
        loyalty=None if same is None else same.median,
        dense_speed=speeds["dense"],
        method_speed=speeds["method"],
    )


class AbilityScore(BaseModel):
    """Mean scores of the datasets of one ability, between 0 and 1."""

    datasets: list[str]
    dense: float
    method: float | None = None


class Summary(BaseModel):
    """A suite's own figures over the datasets that are done; scores and ratios as shares, 1 = all.

    ``None``: without a method; nothing that could be retained; fewer than two datasets; nothing was timed.
    """

    datasets: list[str]
    abilities: dict[str, AbilityScore]
    dense: float = Field(description="UniPruneBench's average: mean score of the datasets.")
    method: float | None = None
    retained: float | None = Field(None, description="Mean ratio to the unmodified model's scores.")
    retained_rms: float | None = Field(None, description="EffiVLM-Bench's overall performance (OP).")
    lowest: str | None = Field(None, description="The dataset that suffers most.")
    lowest_ratio: float | None = None
    retained_without_lowest: float | None = None
    without_ratio: list[str] = Field(
        default_factory=list, description="Datasets on which the unmodified model scores nothing."
    )
    loyalty: float | None = Field(None, description="EffiVLM-Bench's OL: mean over datasets.")
    unevenness: float | None = Field(None, description="EffiVLM-Bench's OG over datasets, in per cent.")
    dense_speed: Speed | None = Field(None, description="Means over the datasets that were timed.")
    method_speed: Speed | None = None

    @property
    def prefill_gain(self) -> float | None:
        """EffiVLM-Bench's efficiency (OE) up to the first token."""
        if self.dense_speed is None or self.method_speed is None:
            return None
        return self.dense_speed.prefill / self.method_speed.prefill

    @property
    def decode_gain(self) -> float | None:
        """Its efficiency (OE) of decoding."""
        dense, method = self.dense_speed, self.method_speed
        if dense is None or method is None or dense.decode is None or method.decode is None:
            return None
        return method.decode / dense.decode


def summarise(results: Sequence[DatasetResult]) -> Summary:
    """The figures over all results (at least one), which are of one model and one method."""
    groups: dict[str, list[DatasetResult]] = defaultdict(list)
    for result in results:
        groups[result.ability].append(result)
    found = Summary(
        datasets=[result.dataset for result in results],
        abilities={
            name: AbilityScore(
                datasets=[one.dataset for one in own],
                dense=fmean(one.dense for one in own),
                method=_mean(one.method for one in own),
            )
            for name, own in groups.items()
        },
        dense=fmean(result.dense for result in results),
        method=_mean(result.method for result in results),
        loyalty=_mean(result.loyalty for result in results),
    )
    if found.method is not None:
        _retained(found, results)
        _sped_up(found, results)
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


def _retained(found: Summary, results: Sequence[DatasetResult]) -> None:
    scores = {result.dataset: result.method for result in results if result.method is not None}
    try:
        kept: Retention = retention(scores, {result.dataset: result.dense for result in results})
    except BadInput:  # the unmodified model scores nothing at all
        found.without_ratio = found.datasets
        return
    found.retained, found.retained_rms = kept.mean, kept.overall
    found.lowest, found.lowest_ratio = kept.lowest, kept.ratios[kept.lowest]
    found.without_ratio = list(kept.without)
    rest = [ratio for name, ratio in kept.ratios.items() if name != kept.lowest]
    if rest:
        found.retained_without_lowest = fmean(rest)
        found.unevenness = unevenness([kept]) if kept.mean else None


def _sped_up(found: Summary, results: Sequence[DatasetResult]) -> None:
    """Means of times, the same work on both sides."""
    timed = [one for one in results if one.dense_speed is not None and one.method_speed is not None]
    found.dense_speed = _mean_speed([one.dense_speed for one in timed])
    found.method_speed = _mean_speed([one.method_speed for one in timed])


def _mean_speed(speeds: Sequence[Speed | None]) -> Speed | None:
    """Mean time of a prefill and of a token, the latter as tokens/s; decoding only where it was timed everywhere."""
    given = [speed for speed in speeds if speed is not None]
    if not given:
        return None
    steps = [1 / speed.decode for speed in given if speed.decode]
    return Speed(
        prefill=fmean(speed.prefill for speed in given),
        decode=1 / fmean(steps) if len(steps) == len(given) else None,
    )
