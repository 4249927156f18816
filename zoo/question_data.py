"""Multiple-choice questions that a package carries, for tasks that rank answers by their likelihood.

Fetched when first used, checked against pinned digests and kept, as in ``zoo.data``. For evaluation only.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass

from zoo.data import Packaged
from zoo.errors import BadInput
from zoo.models.packages import PackageFile, fetch


@dataclass(frozen=True)
class Question:
    """A question, its possible answers, and the index of the right one."""

    text: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class QuestionSet:
    """A packaged set; ``form`` matches a question with its lettered options."""

    data: Packaged
    form: re.Pattern[str]


def _packaged(member: str, digest: str, description: str, licence: str) -> Packaged:
    file = PackageFile(
        kind="pip",
        package="evals",
        version="3.0.1.post1",
        member=f"evals/registry/data/{member}",
        sha256=digest,
        megabytes=46.3,
    )
    return Packaged(file, description, licence)


QUESTIONS = {
    "quartz": QuestionSet(
        _packaged(
            "quartz/samples.jsonl",
            "e439668cc38aa157bb1a746d9540f61f29d7f494a6618a955c8e3b5f55a363e7",
            "3,860 questions on qualitative relations with two options (QuaRTz, Tafjord et al. 2019).",
            "CC-BY-4.0",
        ),
        re.compile(r"(?P<text>.*?)\s+A: (?P<A>.*?)\s+B: (?P<B>.*?)\s*", re.DOTALL),
    ),
    "social-iqa": QuestionSet(
        _packaged(
            "theory_of_mind/socialiqa/test.jsonl",
            "33e5a7e1f8270934fcff115f18ca51aede77987d1225cf3ac718a22fb1715714",
            "2,224 questions on everyday situations with three options (Social IQa, Sap et al. 2019).",
            "as stated by https://allenai.org/data/socialiqa",
        ),
        re.compile(r"(?P<text>.*) A: (?P<A>.*); B: (?P<B>.*); C: (?P<C>.*)\.", re.DOTALL),
    ),
}
"""Packaged sets by name."""


def load_questions(name: str, limit: int | None = None) -> list[Question]:
    """Questions of a packaged set.

    Args:
        name: in ``QUESTIONS``.
        limit: how many; always the same ones, drawn evenly from the whole set. ``None`` = all.

    Raises:
        BadInput: there is no such set.
        DownloadFailed: it could not be fetched.
    """
    if name not in QUESTIONS:
        raise BadInput(f"there are no questions called '{name}'; there are {', '.join(QUESTIONS)}")
    chosen = QUESTIONS[name]
    lines = fetch(chosen.data.file).read_text(encoding="utf-8").splitlines()
    found = [_read(json.loads(line), chosen.form) for line in lines]
    random.Random(0).shuffle(found)  # noqa: S311 - the order of questions is no secret
    return found[:limit]


def _read(row: dict[str, object], form: re.Pattern[str]) -> Question:
    """A line of the package: a chat whose last turn holds the question, and the letter of the right option."""
    turns = row["input"]
    assert isinstance(turns, list)
    parts = form.fullmatch(turns[-1]["content"])
    assert parts is not None, "the file is pinned, and every line of it has this form"
    letters = [name for name in parts.groupdict() if name != "text"]
    return Question(
        parts["text"].strip(),
        tuple(parts[letter].strip() for letter in letters),
        letters.index(str(row["ideal"])),
    )
