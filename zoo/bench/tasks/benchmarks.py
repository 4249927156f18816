"""A task for vision-language models: one dataset of a suite (``zoo.suites``), scored by the dataset's own rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import Field, computed_field, model_validator

from zoo.bench.record import Comparison, Figure, compare
from zoo.bench.tasks import Desk, Task, task

if TYPE_CHECKING:
    from zoo.bench.session import Arm
    from zoo.suites.rows import Question
    from zoo.suites.tables import Dataset


@task("benchmark")
class Benchmark(Task):
    """Questions of a public dataset, as a suite such as uniprunebench puts and scores them."""

    suite: str = Field(
        "uniprunebench", description="A suite that comes with the zoo, or a suite file (.toml)."
    )
    dataset: str = Field("pope", description="One of its datasets.")
    limit: int | None = Field(None, ge=1, description="The first questions; None: all.")
    batch: int = Field(1, ge=1, description="Questions at once.")
    timed: int = Field(0, ge=0, description="Questions on which prefill and decoding are timed.")

    @model_validator(mode="after")
    def _can_be_asked(self) -> Benchmark:
        _ = self.described
        return self

    @cached_property
    def described(self) -> Dataset:
        """What the suite says of the dataset."""
        from zoo.suites.tables import load_suite

        return load_suite(self.suite).dataset(self.dataset)

    @computed_field
    def protocol(self) -> dict[str, object]:
        """Where the dataset is, how it is asked and scored: part of what a run records."""
        return self.described.model_dump(mode="json", exclude_defaults=True)

    def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
        """``accuracy`` (where answers are right or wrong), ``benchmark-score`` (where it is not the dataset's score).

        With a method also ``loyalty`` and, when asked for, ``prefill-time`` and ``decode-speed``.

        Raises:
            Refused: the model is no vision-language model with a processor.
            BadInput, NeedsExtra, DownloadFailed: the dataset cannot be read.
        """
        from zoo.bench.scoring import fraction
        from zoo.suites.asking import check_model, speeds

        check_model(dense.loaded)
        questions = self.questions(desk)
        label = f"{self.dataset}, {len(questions)} questions"
        own = desk.answers(self, lambda: self._said(dense, questions, desk))
        others = None if method is None else self._said(method, questions, desk)
        sides = (_scored(questions, own), None if others is None else _scored(questions, others))
        rows = [
            compare(
                quantity, sides[0][quantity], None if sides[1] is None else sides[1][quantity], task=label
            )
            for quantity in sides[0]
        ]
        if others is not None and method is not None:
            same = fraction([a == b for a, b in zip(own, others, strict=True)])
            rows.append(compare("loyalty", None, same, task=label))
            if self.timed:
                rows += speeds(dense, method, questions[: self.timed], self.dataset, desk.progress)
        return rows

    def questions(self, desk: Desk) -> Sequence[Question]:
        """What is asked; read once for all methods that are asked it in turn."""
        from zoo.suites.rows import read_questions

        key = (self.described.model_dump_json(), self.limit)
        desk.progress(f"{self.dataset}: reading questions", 0, 0)
        return desk.kept.once("questions", key, lambda: read_questions(self.described, self.limit))

    def _said(self, arm: Arm, questions: Sequence[Question], desk: Desk) -> list[str]:
        """What one side's answers say; an answer that says nothing to its rule stands as it is, to be compared."""
        from zoo.suites.answers import RULES, plain
        from zoo.suites.asking import answers

        given = answers(arm, questions, self.batch, desk.progress)
        return [
            RULES[question.rule].read(text, question.choices) or plain(text)
            for question, text in zip(questions, given, strict=True)
        ]


def _scored(questions: Sequence[Question], said: Sequence[str]) -> dict[str, Figure]:
    """One side's figures by quantity; which ones there are depends on the dataset alone."""
    from zoo.bench.scoring import bootstrap, fraction
    from zoo.suites.answers import GRADED, RULES
    from zoo.suites.scores import dataset_score

    credit = [
        RULES[question.rule].credit(answer, question.expected)
        for question, answer in zip(questions, said, strict=True)
    ]
    figures = {}
    dataset = questions[0].dataset
    graded = dataset.rule in GRADED
    if not graded:
        figures["accuracy"] = fraction([value == 1 for value in credit])
    if graded or not dataset.plain:
        import numpy as np

        spread = None
        if dataset.plain:
            low, high = np.quantile(bootstrap(credit), (0.25, 0.75))
            spread = float(high - low) / 2
        score = dataset_score(questions, said, credit)
        figures["benchmark-score"] = Figure(median=score, spread=spread, n=len(questions))
    return figures
