"""Trials in the plane of gain and quality, and task by task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from taxonomy.evidence.trial import Trial
from taxonomy.scores import COUNTED, Score

PROOF = "identical-outputs"
"""The quantity of a run that shows that a method loses nothing."""

Setting = tuple[str, str, str | None, str | None]
"""Method, model, device and number format."""


def proven_by(trial: Trial) -> Setting:
    """What a proof holds for: other devices and number formats round differently."""
    return trial.method, trial.model, trial.device, trial.dtype


def proofs_of(found: Iterable[Trial]) -> dict[Setting, Trial]:
    """The runs that compared outputs with the unmodified model's one by one; of several the last in ``found``."""
    return {proven_by(run): run for run in found if PROOF in run.scores and run.scores[PROOF].counted}


@dataclass(frozen=True)
class Point:
    """A trial in the plane of a front.

    Attributes:
        best: faster or smaller, and nothing else is at least as good in both.
        proof: a run of the method on the same model that compared outputs with the unmodified model's one by one and
            timed nothing, if there is one; its setting may be another.
    """

    trial: Trial
    gain: Score
    quality: Score
    best: bool
    proof: Trial | None = None

    @property
    def unchanged(self) -> bool:
        """Whether its quality is the unmodified model's, in the proof too."""
        return all(score.value == 1 for score in (self.quality, self.proven) if score is not None)

    @property
    def proven(self) -> Score | None:
        """How many outputs of the proof are the unmodified model's."""
        return None if self.proof is None else self.proof.scores[PROOF]

    @property
    def passes(self) -> float | None:
        """Tokens that a pass of the model commits, over all tasks, where they were counted."""
        return self.trial.scores[COUNTED[0]].value if COUNTED[0] in self.trial.scores else None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Its gain task by task, in the order of ``gain.tasks``."""
        quantity = self.gain.quantity
        own = {
            task: run
            for run in self.trial.members
            if quantity in run.scores
            for task in run.scores[quantity].tasks
        }
        return tuple(
            self._cell(task, part, own.get(task))
            for task, part in zip(self.gain.tasks, self.gain.parts, strict=True)
        )

    def _cell(self, task: str, part: float, run: Trial | None) -> Cell:
        sure = self.gain.beyond_noise(part)
        if run is None:
            return Cell(task, part, sure, self.gain.noise, None, None)
        gain, passes = run.scores[self.gain.quantity], run.scores.get(COUNTED[0])
        return Cell(task, part, sure, gain.noise, gain.bound, None if passes is None else passes.value)


@dataclass(frozen=True)
class Cell:
    """The gain of a method on one task.

    Attributes:
        gain: as measured.
        sure: the same, or 1 where the noise of all tasks together could explain it.
        noise: relative uncertainty on this task.
        bound: the largest gain that the saved work allows, where the run states it.
        passes: tokens that a pass of the model commits, where they were counted.
    """

    task: str
    gain: float
    sure: float
    noise: float
    bound: float | None
    passes: float | None

    @property
    def credited(self) -> float:
        """``gain``, but never more than its bound."""
        return self.gain if self.bound is None else min(self.gain, self.bound)


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

    @property
    def by_task(self) -> bool:
        """Whether the gain was measured on several tasks."""
        return len(self.gain_tasks) > 1

    @property
    def unchanged(self) -> bool:
        """Whether all of them leave the quality as it is: then only the gain tells them apart."""
        return all(point.unchanged for point in self.points)

    @property
    def noise(self) -> float:
        """The largest relative uncertainty of a gain."""
        return max(point.gain.noise for point in self.points)

    def noise_on(self, task: str) -> float:
        """The same on one of ``gain_tasks``."""
        return max(cell.noise for point in self.points for cell in point.cells if cell.task == task)
