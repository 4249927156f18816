"""How much of the unmodified model's quality a method keeps over several benchmarks: EffiVLM-Bench's metrics.

EffiVLM-Bench (Wang et al., ACL 2025) looks at the ratio of each benchmark's score to the unmodified model's, so that
benchmarks of any scale can be put together. Its overall performance is the *root mean square* of these ratios, which
uneven damage lifts (the square of it is the square of their mean plus their variance): mean and lowest ratio therefore
always stand beside it. UniPruneBench (2511.02650) averages the scores themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from zoo.errors import BadInput


@dataclass(frozen=True)
class Retention:
    """What is kept over several benchmarks; 1 = as much as the unmodified model has.

    Attributes:
        ratios: score over the unmodified model's score, by benchmark.
        without: benchmarks on which the unmodified model scores nothing, so that there is no ratio.
    """

    ratios: Mapping[str, float]
    without: tuple[str, ...] = ()

    @property
    def overall(self) -> float:
        """EffiVLM-Bench's overall performance: the root mean square of the ratios."""
        return math.sqrt(fmean(ratio**2 for ratio in self.ratios.values()))

    @property
    def mean(self) -> float:
        """Arithmetic mean of the ratios."""
        return fmean(self.ratios.values())

    @property
    def lowest(self) -> str:
        """The benchmark that suffers most."""
        return min(self.ratios, key=self.ratios.__getitem__)


def retention(scores: Mapping[str, float], dense: Mapping[str, float]) -> Retention:
    """Ratios of scores to the unmodified model's.

    Args:
        scores: by benchmark, on any scale of which more is better and 0 is nothing.
        dense: the unmodified model's, of the same benchmarks.

    Raises:
        BadInput: other benchmarks, or the unmodified model scores nothing at all.
    """
    if scores.keys() != dense.keys():
        raise BadInput("retention compares scores on the same benchmarks; give both models the same ones")
    ratios = {name: score / dense[name] for name, score in scores.items() if dense[name] > 0}
    if not ratios:
        raise BadInput("the unmodified model scores nothing on these benchmarks: there is nothing to retain")
    return Retention(ratios, tuple(name for name in scores if name not in ratios))


def average(scores: Mapping[str, float]) -> float:
    """UniPruneBench's average: the plain mean of scores that are all on one scale."""
    return fmean(scores.values())


def loyalty(answers: Sequence[Any], dense: Sequence[Any]) -> float:
    """EffiVLM-Bench's loyalty: fraction of samples answered as the unmodified model answers them, right or wrong.

    The paper does not say how answers are compared; here: for equality, once they are read as the task reads them
    (reconstructed).

    Raises:
        BadInput: different numbers of answers, or none.
    """
    if len(answers) != len(dense) or not dense:
        raise BadInput(
            f"loyalty compares answers to the same samples, one at least; given: {len(answers)} and {len(dense)}"
        )
    return fmean(a == b for a, b in zip(answers, dense, strict=True))


def unevenness(models: Sequence[Retention]) -> float:
    """EffiVLM-Bench's generalisation: how unevenly a method keeps quality over benchmarks, in per cent; 0 = evenly.

    The standard deviation (of the population) over benchmarks of what is kept on average over models, over its mean.

    Args:
        models: what one method keeps of each model, on the same two benchmarks or more.

    Raises:
        BadInput: no models, different benchmarks, or fewer than two.
    """
    if not models or any(one.ratios.keys() != models[0].ratios.keys() for one in models):
        raise BadInput("generalisation needs one model or more, all with the same benchmarks")
    if len(models[0].ratios) < 2:
        raise BadInput("generalisation is over two benchmarks or more")
    means = [fmean(one.ratios[name] for one in models) for name in models[0].ratios]
    return 100 * pstdev(means) / fmean(means)
