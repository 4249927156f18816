"""Findings of papers, put to our own measurements.

A finding is a TOML file in ``taxonomy/findings``: what a paper concludes, where it says so, and the test that asks our
measurements the same. Its figure comes with a 95% bootstrap interval: over questions where the runs kept which ones
they answered rightly, else over cells. The verdict follows from that interval alone: *agrees*, *disagrees* or
*undecided*; *not measured yet* where there is nothing to draw from; *not testable here*, with a reason, where nothing
could be.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from taxonomy import paths
from taxonomy.errors import CatalogError
from taxonomy.evidence import Trial
from taxonomy.questions import Strict, Test, Untestable
from taxonomy.resampling import Outcomes, samples

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FINDINGS = paths.PACKAGE / "findings"
FEWEST = 4
"""Cells that an interval over cells needs at least."""

RESAMPLES = 1000
Verdict = Literal["agrees", "disagrees", "undecided", "not measured yet", "not testable here"]


class Finding(Strict):
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
    """Our answer to a finding: figure with its 95% interval, from ``cells`` cells; ``trials`` it rests on.

    The interval says what other samples of ``over`` would give: of the questions that were asked, where it is known
    which of them were answered rightly, else of the cells.
    """

    finding: Finding
    verdict: Verdict
    cells: int
    figure: float | None
    low: float | None
    high: float | None
    trials: tuple[Trial, ...]
    over: Literal["questions", "cells"] = "cells"


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


def judge(finding: Finding, trials: Sequence[Trial], outcomes: Outcomes | None = None) -> Outcome:
    """Ask ``trials`` the question of ``finding``.

    Args:
        finding: whose test is put.
        trials: finished runs.
        outcomes: which questions they answered rightly, as far as that is known.
    """
    test = finding.test
    if isinstance(test, Untestable):
        return Outcome(finding, "not testable here", 0, None, None, None, ())
    cells: Sequence[Any] = test.cells(trials)
    used = tuple(trial for trial, _, _ in test.chosen(trials))
    again = samples(used, outcomes or {}, test.quality, RESAMPLES)
    if not cells or (again is None and len(cells) < FEWEST):
        return Outcome(finding, "not measured yet", len(cells), None, None, None, used)
    figure: Callable[[Sequence[Any]], float] = test.figure
    if again is None:
        low, high = interval(cells, figure)
    else:
        low, high = _middle([figure(drawn) for sample in again if (drawn := test.cells(sample))])
    yes, no = (low > test.threshold, high < test.threshold)
    if not test.above:
        yes, no = no, low >= test.threshold
    verdict: Verdict = "agrees" if yes else "disagrees" if no else "undecided"
    over: Literal["questions", "cells"] = "cells" if again is None else "questions"
    return Outcome(finding, verdict, len(cells), figure(cells), low, high, used, over)


def interval(
    cells: Sequence[Any], figure: Callable[[Sequence[Any]], float], seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap: the figure of ``RESAMPLES`` samples of ``cells``, drawn with replacement; middle 95%."""
    draw = partial(random.Random(seed).choices, cells, k=len(cells))  # noqa: S311 - resampling, not a secret
    return _middle([figure(draw()) for _ in range(RESAMPLES)])


def _middle(figures: Sequence[float]) -> tuple[float, float]:
    """Ends of the middle 95%."""
    ordered = sorted(figures)
    return ordered[round(0.025 * (len(ordered) - 1))], ordered[round(0.975 * (len(ordered) - 1))]
