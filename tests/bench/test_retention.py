from __future__ import annotations

from statistics import fmean

import pytest

from zoo.bench.retention import average, loyalty, retention, unevenness
from zoo.errors import BadInput

# EffiVLM-Bench, LLaVA-OneVision-7B: the unmodified model, and FastV with 1% of the visual tokens.
DENSE = (87, 80.00, 74.79, 595, 89.96, 61.92, 45.44, 1974.1, 65.88, 58.75, 58.20, 71.40, 83.12, 55.00, 87.25)
FASTV = (8, 14.00, 9.18, 27, 66.35, 35.04, 40.89, 697.7, 36.86, 28.97, 36.40, 49.10, 27.69, 12.30, 20.95)


def named(scores: tuple[float, ...]) -> dict[str, float]:
    return {str(number): score for number, score in enumerate(scores)}


def test_overall_performance_is_the_published_one() -> None:
    kept = retention(named(FASTV), named(DENSE))
    assert kept.overall == pytest.approx(0.483, abs=5e-4), "printed as 0.48"
    assert kept.mean == pytest.approx(0.410, abs=5e-4)
    assert kept.lowest == "3", "OCRBench"


def test_benchmarks_without_a_score_have_no_ratio() -> None:
    kept = retention({"a": 1.0, "b": 0.5}, {"a": 0.0, "b": 1.0})
    assert (dict(kept.ratios), kept.without) == ({"b": 0.5}, ("a",))
    with pytest.raises(BadInput, match="scores nothing"):
        retention({"a": 1.0}, {"a": 0.0})
    with pytest.raises(BadInput, match="same benchmarks"):
        retention({"a": 1.0}, {"b": 1.0})


def test_unevenness_is_a_coefficient_of_variation_over_benchmarks() -> None:
    one = retention({"a": 0.8, "b": 0.4}, {"a": 1.0, "b": 1.0})
    other = retention({"a": 0.6, "b": 0.2}, {"a": 1.0, "b": 1.0})
    assert unevenness([one, other]) == pytest.approx(100 * 0.2 / 0.5)
    assert unevenness([retention(named(DENSE), named(DENSE))]) == 0
    with pytest.raises(BadInput, match="two benchmarks"):
        unevenness([retention({"a": 1.0}, {"a": 1.0})])
    with pytest.raises(BadInput, match="same benchmarks"):
        unevenness([])


def test_loyalty_counts_wrong_answers_that_stay() -> None:
    assert loyalty(["cat", "two", "no"], ["cat", "two", "yes"]) == pytest.approx(2 / 3)
    with pytest.raises(BadInput, match="same samples"):
        loyalty(["cat"], [])


def test_average_is_the_mean_of_the_columns() -> None:
    row = (48.1, 43.5, 63.6, 38.8, 30.2, 68.2, 80.1)  # UniPruneBench, LLaVA-1.5-7B unpruned: 53.2
    assert average(named(row)) == pytest.approx(fmean(row))
    assert average(named(row)) == pytest.approx(53.2, abs=0.05)
