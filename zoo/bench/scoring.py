"""Figures of questions that were answered right or wrong, with what chance alone would move them.

The spread of such a figure is that of the bootstrap over questions: half the distance between the quartiles of the
mean when as many questions are drawn with replacement, so that it reads like the spread of every other figure.
Each question's outcome stays with the figure (``items``), so that two methods that were asked the same can be compared
question by question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoo.bench.record import Figure

DRAWS = 2000
"""Bootstrap samples."""


def fraction(right: Sequence[bool], seed: int = 0) -> Figure:
    """Fraction of ``right`` answers, in ``[0, 1]``, with its bootstrap spread; at least one question."""
    low, high = np.quantile(bootstrap([float(value) for value in right], seed), (0.25, 0.75))
    return Figure(
        median=sum(right) / len(right),
        spread=float(high - low) / 2,
        n=len(right),
        items="".join("1" if value else "0" for value in right),
    )


def interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean of ``values`` (percentile method, Efron & Tibshirani 1993, chapter 13).

    Give differences per question for the interval of the mean difference of two methods.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(bootstrap(values, seed), (tail, 1 - tail))
    return float(low), float(high)


def bootstrap(values: Sequence[float], seed: int = 0) -> np.ndarray:
    """Means ``[DRAWS]`` of as many values drawn with replacement."""
    table = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed)
    return np.array([table[draws.integers(0, len(table), len(table))].mean() for _ in range(DRAWS)])
