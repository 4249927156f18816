"""The kinds of test that a finding puts to our measurements: which runs it looks at, the cells, and their figure."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from itertools import product
from statistics import fmean, geometric_mean
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from taxonomy.evidence import BUDGETS, Score, Trial
from taxonomy.scores import SELECTION

Budget = tuple[str, float]
"""Name and value of the parameter that sets how much leaves."""


class Strict(BaseModel):
    """Data that does not change and has no field but those named."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Test(Strict):
    """What all tests share: which runs they look at.

    Attributes:
        quality: the quantity that is compared, as the share of the unmodified model's.
        lowest, highest: bounds of the budget parameter (``sparsity`` or ``keep_ratio``).
        models: references of models; empty = every model.
    """

    quality: str = "accuracy"
    lowest: float = 0.0
    highest: float = 1.0
    models: tuple[str, ...] = ()

    by_budget: ClassVar[bool] = True
    """Whether runs without a budget are left out, and only equal budgets are compared."""

    @property
    def methods(self) -> Container[str] | None:
        """The methods it asks about; ``None`` = all."""
        return None

    @property
    def column(self) -> str:
        """What the score of a run is, for the head of a column."""
        return f"{self.quality} kept"

    def chosen(self, trials: Sequence[Trial]) -> list[tuple[Trial, Budget, Score]]:
        """Runs of its methods with the quality and a budget within the bounds."""
        methods = self.methods
        return [
            (trial, budget, trial.scores[self.quality])
            for trial in trials
            if self.quality in trial.scores
            and (methods is None or trial.method in methods)
            and (not self.models or trial.model in self.models)
            and (budget := _budget(trial) if self.by_budget else _NO_BUDGET) is not None
            and self.lowest <= budget[1] <= self.highest
        ]


class Beats(_Test):
    """``better`` keep more than ``than`` at equal budgets: mean (geometric) of the ratios of what both keep, over 1."""

    kind: Literal["beats"]
    better: tuple[str, ...]
    than: tuple[str, ...]
    label: str = "quality kept, over that of the others (mean of the pairs)"
    threshold: float = 1.0
    above: bool = True

    @property
    def methods(self) -> Container[str]:
        """Those on either side."""
        return frozenset((*self.better, *self.than))

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """One ratio per pair on the same model, hardware and budget."""
        return [
            group[one] / group[other]
            for group in _kept(self.chosen(trials), by=lambda trial: trial.method).values()
            for one in self.better
            for other in self.than
            if one in group and other in group and group[one] > 0 and group[other] > 0
        ]

    def figure(self, cells: Sequence[float]) -> float:
        """Geometric mean."""
        return geometric_mean(cells)


class _Mean(_Test):
    """A test whose figure is the mean of its cells."""

    def figure(self, cells: Sequence[float]) -> float:
        """The mean."""
        return fmean(cells)


class HoldsUp(_Mean):
    """A baseline is at least as good as most methods: share of the (method, budget) cells in which it is."""

    kind: Literal["holds-up"]
    baseline: str
    label: str = "share of methods and budgets that the baseline matches or beats"
    threshold: float = 0.5
    above: bool = True

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """1 where the baseline keeps at least as much, else 0."""
        return [
            float(group[self.baseline] >= value)
            for group in _kept(self.chosen(trials)).values()
            if self.baseline in group
            for variant, value in group.items()
            if variant.split(" ")[0] != self.baseline
        ]


class NoWinner(_Test):
    """No method wins everywhere: the largest share of (model, budget, task) cells that one method wins."""

    kind: Literal["no-winner"]
    label: str = "largest share of budgets and tasks that a single method wins"
    threshold: float = 1.0
    above: bool = False

    def cells(self, trials: Sequence[Trial]) -> list[str]:
        """The winner of each cell with two methods or more; a tie goes to the first by name."""
        kept: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for trial, budget, score in self.chosen(trials):
            for task, part in zip(score.tasks, score.parts, strict=True):
                kept[_place(trial, budget, score), task][variant_of(trial)].append(part)
        means = [{variant: fmean(parts) for variant, parts in group.items()} for group in kept.values()]
        return [max(sorted(group), key=group.__getitem__) for group in means if len(group) > 1]

    def figure(self, cells: Sequence[str]) -> float:
        """Share of the most frequent winner."""
        return Counter(cells).most_common(1)[0][1] / len(cells)


class MostFragile(_Mean):
    """One task (a word of its label) suffers most: share of the runs in which no other task keeps less."""

    kind: Literal["most-fragile"]
    task: str
    label: str = "share of the runs in which this task suffers most"
    threshold: float = 0.5
    above: bool = True

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """1 where no other task keeps less, for each run that has the task beside others."""
        found = []
        for _, _, score in self.chosen(trials):
            parts = dict(zip(score.tasks, score.parts, strict=True))
            asked = [part for task, part in parts.items() if _named(task, self.task)]
            if asked and len(parts) > 1:
                found.append(float(min(asked) <= min(parts.values())))
        return found


class BudgetDominates(_Test):
    """How much is kept matters more than the method: variance between budgets minus that between methods.

    Both as shares of the total variance (eta squared of either factor alone).
    """

    kind: Literal["budget-dominates"]
    label: str = "variance explained by the budget, minus that by the method"
    threshold: float = 0.0
    above: bool = True

    def cells(self, trials: Sequence[Trial]) -> list[tuple[str, str, float]]:
        """``(method, budget, quality kept)`` of every run."""
        return [
            (variant_of(trial), f"{budget[0]}={budget[1]:g}", score.value)
            for trial, budget, score in self.chosen(trials)
        ]

    def figure(self, cells: Sequence[tuple[str, str, float]]) -> float:
        """The difference of the two shares; 0 when all values are equal."""
        return _explained([(b, value) for _, b, value in cells]) - _explained(
            [(m, value) for m, _, value in cells]
        )


def _explained(values: Sequence[tuple[str, float]]) -> float:
    """Share of the variance that lies between the groups."""
    mean = fmean(value for _, value in values)
    total = sum((value - mean) ** 2 for _, value in values)
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in values:
        groups[name].append(value)
    between = sum(len(group) * (fmean(group) - mean) ** 2 for group in groups.values())
    return between / total if total > 0 else 0.0


class Flips(_Mean):
    """Answers change where scores hardly do: mean share of changed answers in the cells that keep ``nearly`` all."""

    kind: Literal["flips"]
    nearly: float = Field(0.95, description="Least share of the unmodified model's accuracy.")
    label: str = "share of answers that change on tasks whose accuracy hardly does (mean)"
    threshold: float = 0.1
    above: bool = True

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """One share per run and task."""
        found = []
        for trial, _, score in self.chosen(trials):
            if "loyalty" not in trial.scores:
                continue
            same = dict(zip(trial.scores["loyalty"].tasks, trial.scores["loyalty"].parts, strict=True))
            found += [
                1 - same[task]
                for task, part in zip(score.tasks, score.parts, strict=True)
                if task in same and part >= self.nearly
            ]
        return found


class CheapSelection(_Mean):
    """Choosing what to keep costs little of the prefill: mean share over the runs."""

    kind: Literal["cheap-selection"]
    quality: str = SELECTION
    label: str = "share of the method's own prefill that its choice takes (mean)"
    threshold: float = 0.05
    above: bool = False

    @property
    def column(self) -> str:
        """A share of the prefill."""
        return "share of the prefill"

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """One share per run."""
        return [score.value for _, _, score in self.chosen(trials)]


class Untestable(Strict):
    """Nothing here can answer it, and why."""

    kind: Literal["untestable"]
    reason: str


class _ByTask(_Test):
    """What the tests share that ask for gains by task. What the noise could explain counts as no gain.

    Attributes:
        better: the methods.
        on: the tasks that the claim is about, each by a word of its label.
    """

    by_budget: ClassVar[bool] = False
    quality: str = "generation-speed"
    better: tuple[str, ...]
    on: tuple[str, ...]
    threshold: float = 1.0
    above: bool = True

    def chosen(self, trials: Sequence[Trial]) -> list[tuple[Trial, Budget, Score]]:
        """Runs of its methods on one of the tasks at least."""
        return [found for found in super().chosen(trials) if any(map(self._asked, found[2].tasks))]

    def _asked(self, task: str) -> bool:
        return any(_named(task, word) for word in self.on)

    def gains(self, trials: Sequence[Trial]) -> list[tuple[Trial, dict[str, float], dict[str, float]]]:
        """Each run with its gains on the tasks asked about, and on the others."""
        found = []
        for trial, _, score in self.chosen(trials):
            gains = [
                (task, score.beyond_noise(part)) for task, part in zip(score.tasks, score.parts, strict=True)
            ]
            asked = {task: gain for task, gain in gains if self._asked(task)}
            found.append((trial, asked, {task: gain for task, gain in gains if task not in asked}))
        return found

    def figure(self, cells: Sequence[float]) -> float:
        """Geometric mean."""
        return geometric_mean(cells)


class PaysOn(_ByTask):
    """Methods gain more on some tasks than on the others: mean of the ratios, over 1."""

    kind: Literal["pays-on"]
    label: str = "gain on these tasks, over the mean gain on the others (mean of methods and tasks)"

    @property
    def methods(self) -> Container[str]:
        """Those that are said to gain."""
        return frozenset(self.better)

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """One ratio per run and task asked about."""
        return [
            gain / geometric_mean(others.values())
            for _, asked, others in self.gains(trials)
            if others
            for gain in asked.values()
        ]


class BeatsOn(_ByTask):
    """``better`` gain more than ``than`` on some tasks: mean of the ratios of their gains, over 1."""

    kind: Literal["beats-on"]
    than: tuple[str, ...]
    label: str = "gain on these tasks, over that of the others (mean of the pairs and tasks)"

    @property
    def methods(self) -> Container[str]:
        """Those on either side."""
        return frozenset((*self.better, *self.than))

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """One ratio per pair and task, on the same model and hardware."""
        places: dict[Any, dict[str, dict[str, float]]] = defaultdict(dict)
        for trial, asked, _ in self.gains(trials):
            places[_place(trial, _NO_BUDGET, trial.scores[self.quality])][trial.method] = asked
        return [
            group[one][task] / group[other][task]
            for group in places.values()
            for one, other in product(self.better, self.than)
            if one in group and other in group
            for task in group[one]
        ]


Test = Annotated[
    Beats
    | HoldsUp
    | NoWinner
    | MostFragile
    | BudgetDominates
    | Flips
    | CheapSelection
    | PaysOn
    | BeatsOn
    | Untestable,
    Field(discriminator="kind"),
]


_NO_BUDGET: Budget = ("", 0.0)


def _named(task: str, word: str) -> bool:
    """Whether ``word`` is a word of the label of a task."""
    return word in re.split(r"\W+", task)


def _budget(trial: Trial) -> Budget | None:
    """The parameter that sets how much leaves, if the run has one."""
    for name in BUDGETS:
        value = trial.settings.get(name)
        if isinstance(value, int | float):
            return name, float(value)
    return None


def variant_of(trial: Trial) -> str:
    """The method with what is set besides its budget: ``random-tokens layer=2``. Seeds are draws of one variant."""
    own = [
        f"{name}={value}"
        for name, value in sorted(trial.settings.items())
        if name not in BUDGETS and name.rpartition(".")[2] != "seed"
    ]
    return " ".join([trial.method, *own])


def _kept(
    chosen: Sequence[tuple[Trial, Budget, Score]], by: Callable[[Trial], str] = variant_of
) -> dict[Any, dict[str, float]]:
    """What each variant keeps, the mean over its draws; by everything that two runs must share to be compared."""
    values: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial, budget, score in chosen:
        values[_place(trial, budget, score)][by(trial)].append(score.value)
    return {place: {name: fmean(draws) for name, draws in group.items()} for place, group in values.items()}


def _place(trial: Trial, budget: Budget, score: Score) -> tuple[Any, ...]:
    """What two runs must share to be compared."""
    return trial.model, trial.hardware, trial.device, trial.dtype, trial.protocol, budget, score.tasks
