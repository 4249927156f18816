"""Tasks for vision-language models: six abilities on canvases of held-out pictures (``zoo.reference``).

The classes of UniPruneBench's ability table, in miniature and with exact answers, so that what a token method loses can
be told apart by what was asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from zoo.bench.record import Comparison, compare
from zoo.bench.tasks import Desk, Task, task

if TYPE_CHECKING:
    from zoo.bench.session import Arm
    from zoo.reference.examination import Exercise


class _OnCanvases(Task):
    """Questions on one ability, each about a canvas of its own, answered greedily."""

    ability: ClassVar[str]
    limit: int = Field(
        100, ge=1, description="Questions that are asked; a smaller number asks the first ones."
    )
    batch: int = Field(8, ge=1, description="Questions at once.")

    def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
        """Two comparisons: ``accuracy`` and, with a method, ``loyalty``.

        Raises:
            Refused: the model is no vision-language model with a processor.
            DownloadFailed: the pictures could not be fetched.
        """
        from zoo.bench.scoring import fraction
        from zoo.reference.examination import exercises

        asked = exercises(self.ability, self.limit, desk.seed)
        label = f"{self.ability} on canvases, {len(asked)} questions"
        own = desk.answers(self, lambda: self._answers(dense, asked, desk))
        others = None if method is None else self._answers(method, asked, desk)
        expected = [exercise.question.answer for exercise in asked]
        scored = [
            None if given is None else fraction([a == b for a, b in zip(given, expected, strict=True)])
            for given in (own, others)
        ]
        rows = [compare("accuracy", scored[0], scored[1], task=label)]
        if others is not None:
            same = fraction([a == b for a, b in zip(own, others, strict=True)])
            rows.append(compare("loyalty", None, same, task=label))
        return rows

    def _answers(self, arm: Arm, asked: list[Exercise], desk: Desk) -> list[str]:
        from zoo.reference.examination import answers

        with arm.ready() as applied:
            return answers(
                applied.loaded, asked, generate=applied.generate, batch=self.batch, progress=desk.progress
            )


@task("recognition")
class Recognition(_OnCanvases):
    """What is at this place of the canvas?"""

    ability = "recognition"


@task("position")
class Position(_OnCanvases):
    """On which side of one picture is another one?"""

    ability = "position"


@task("counting")
class Counting(_OnCanvases):
    """How many pictures are there, of a kind or in all?"""

    ability = "counting"


@task("existence")
class Existence(_OnCanvases):
    """Is there a picture of this kind? Half of the answers are no."""

    ability = "existence"


@task("digits")
class Digits(_OnCanvases):
    """What does the strip of three to six handwritten digits read?"""

    ability = "digits"


@task("compare")
class Compare(_OnCanvases):
    """Are two pictures of the same kind, or are there more of one kind than of another?"""

    ability = "compare"
