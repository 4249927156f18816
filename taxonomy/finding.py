"""Findings of papers, put to our own measurements.

A finding is a TOML file in ``taxonomy/findings``: what a paper concludes, where it says so, and the test that asks our
measurements the same. Its figure comes with a 95% bootstrap interval, and the verdict follows from that interval alone:
*agrees*, *disagrees*, *undecided*, or *not measured yet* while there are fewer than ``FEWEST`` cells to draw from.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taxonomy import paths
from taxonomy.errors import CatalogError
from taxonomy.evidence import Score, Trial

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FINDINGS = paths.PACKAGE / "findings"
FEWEST = 4
"""Cells below which no verdict is given."""

RESAMPLES = 2000
Verdict = Literal["agrees", "disagrees", "undecided", "not measured yet"]
Budget = tuple[str, float]
"""Name and value of the parameter that sets how much leaves."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Test(_Strict):
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

    @property
    def methods(self) -> Container[str] | None:
        """The methods it asks about; ``None`` = all."""
        return None

    def chosen(self, trials: Sequence[Trial]) -> list[tuple[Trial, Budget, Score]]:
        """Runs of its methods with the quality and a budget within the bounds."""
        methods = self.methods
        return [
            (trial, budget, trial.scores[self.quality])
            for trial in trials
            if self.quality in trial.scores
            and (methods is None or trial.method in methods)
            and (not self.models or trial.model in self.models)
            and (budget := _budget(trial)) is not None
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
        kept: dict[Any, dict[str, float]] = defaultdict(dict)
        for trial, budget, score in self.chosen(trials):
            kept[_place(trial, budget, score)][trial.method] = score.value
        return [
            group[one] / group[other]
            for group in kept.values()
            for one in self.better
            for other in self.than
            if one in group and other in group and group[one] > 0 and group[other] > 0
        ]

    def figure(self, cells: Sequence[float]) -> float:
        """Geometric mean."""
        return geometric_mean(cells)


class HoldsUp(_Test):
    """A baseline is at least as good as most methods: share of the (method, budget) cells in which it is."""

    kind: Literal["holds-up"]
    baseline: str
    label: str = "share of methods and budgets that the baseline matches or beats"
    threshold: float = 0.5
    above: bool = True

    def cells(self, trials: Sequence[Trial]) -> list[float]:
        """1 where the baseline keeps at least as much, else 0."""
        kept: dict[Any, dict[str, float]] = defaultdict(dict)
        for trial, budget, score in self.chosen(trials):
            kept[_place(trial, budget, score)][trial.method] = score.value
        return [
            float(group[self.baseline] >= value)
            for group in kept.values()
            if self.baseline in group
            for method, value in group.items()
            if method != self.baseline
        ]

    def figure(self, cells: Sequence[float]) -> float:
        """The share."""
        return fmean(cells)


class NoWinner(_Test):
    """No method wins everywhere: the largest share of (model, budget, task) cells that one method wins."""

    kind: Literal["no-winner"]
    label: str = "largest share of budgets and tasks that a single method wins"
    threshold: float = 1.0
    above: bool = False

    def cells(self, trials: Sequence[Trial]) -> list[str]:
        """The winner of each cell with two methods or more; a tie goes to the first by name."""
        kept: dict[Any, dict[str, float]] = defaultdict(dict)
        for trial, budget, score in self.chosen(trials):
            for task, part in zip(score.tasks, score.parts, strict=True):
                kept[_place(trial, budget, score), task][trial.method] = part
        return [max(sorted(group), key=group.__getitem__) for group in kept.values() if len(group) > 1]

    def figure(self, cells: Sequence[str]) -> float:
        """Share of the most frequent winner."""
        return Counter(cells).most_common(1)[0][1] / len(cells)


class MostFragile(_Test):
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
            asked = [part for task, part in parts.items() if self.task in re.split(r"\W+", task)]
            if asked and len(parts) > 1:
                found.append(float(min(asked) <= min(parts.values())))
        return found

    def figure(self, cells: Sequence[float]) -> float:
        """The share."""
        return fmean(cells)


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
            (trial.method, f"{budget[0]}={budget[1]:g}", score.value)
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


Test = Annotated[Beats | HoldsUp | NoWinner | MostFragile | BudgetDominates, Field(discriminator="kind")]


class Finding(_Strict):
    """A conclusion of a paper.

    Attributes:
        slug: name of the file and of the page.
        title: the conclusion in a few words.
        claim: what the paper says, in our words, with its figures where they were read.
        source: where it says so.
        card: slug of the card of that paper.
        caveats: what must be known about the paper's figures, or about how ours differ from its protocol.
        test: how our measurements are asked.
    """

    slug: str = Field(pattern=r"[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    claim: str
    source: str
    card: str
    caveats: tuple[str, ...] = ()
    test: Test


@dataclass(frozen=True)
class Outcome:
    """Our answer to a finding: figure with its 95% interval, from ``cells`` cells; ``trials`` it rests on."""

    finding: Finding
    verdict: Verdict
    cells: int
    figure: float | None
    low: float | None
    high: float | None
    trials: tuple[Trial, ...]


def load_findings(folder: Path = FINDINGS) -> list[Finding]:
    """All findings, by name of their file.

    Raises:
        CatalogError: one sentence saying which file and what is wrong.
    """
    found = []
    for path in sorted(folder.glob("*.toml")):
        try:
            finding = Finding.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise CatalogError(f"findings/{path.name}: {place}: {first['msg']}") from None
        except (OSError, ValueError) as error:
            raise CatalogError(f"findings/{path.name}: {error}") from None
        if finding.slug != path.stem:
            raise CatalogError(f"findings/{path.name}: slug '{finding.slug}' is not the name of the file")
        found.append(finding)
    return found


def judge(finding: Finding, trials: Sequence[Trial]) -> Outcome:
    """Ask ``trials`` the question of ``finding``."""
    test = finding.test
    cells: Sequence[Any] = test.cells(trials)
    used = tuple(trial for trial, _, _ in test.chosen(trials))
    if len(cells) < FEWEST:
        return Outcome(finding, "not measured yet", len(cells), None, None, None, used)
    figure: Callable[[Sequence[Any]], float] = test.figure
    low, high = interval(cells, figure)
    yes, no = (low > test.threshold, high < test.threshold)
    if not test.above:
        yes, no = no, low >= test.threshold
    verdict: Verdict = "agrees" if yes else "disagrees" if no else "undecided"
    return Outcome(finding, verdict, len(cells), figure(cells), low, high, used)


def interval(
    cells: Sequence[Any], figure: Callable[[Sequence[Any]], float], seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap: the figure of ``RESAMPLES`` samples of ``cells``, drawn with replacement; middle 95%."""
    draw = partial(random.Random(seed).choices, cells, k=len(cells))  # noqa: S311 - resampling, not a secret
    figures = sorted(figure(draw()) for _ in range(RESAMPLES))
    return figures[round(0.025 * (RESAMPLES - 1))], figures[round(0.975 * (RESAMPLES - 1))]


def _budget(trial: Trial) -> Budget | None:
    """The parameter that sets how much leaves, if the run has one."""
    for name in ("sparsity", "keep_ratio"):
        value = trial.settings.get(name)
        if isinstance(value, int | float):
            return name, float(value)
    return None


def _place(trial: Trial, budget: Budget, score: Score) -> tuple[Any, ...]:
    """What two runs must share to be compared."""
    return trial.model, trial.hardware, trial.device, trial.dtype, trial.protocol, budget, score.tasks
