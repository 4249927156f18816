"""OWL: shares of outliers, the band, hosts, n:m mixes, and a layer that is worth more than others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import build, decoder_of, ids, linears, logits

import zoo
from zoo.errors import BadInput, BadParameter
from zoo.methods.weights.owl import Owl, layer_sparsities, outlier_percent
from zoo.methods.weights.wanda import Wanda


def layer_zeros(model: Any) -> list[float]:
    """Fraction of zeros among the linear weights of each layer."""
    counts = [[0, 0] for _ in range(4)]
    for name, module in linears(model).items():
        layer = int(name.split("layers.")[1].split(".")[0])
        counts[layer][0] += int((module.weight == 0).sum())
        counts[layer][1] += module.weight.numel()
    return [zeros / total for zeros, total in counts]


@torch.no_grad()
def plant_outliers(loaded: Any, layer: int) -> None:
    """Give one layer weights that are far larger than their neighbours."""
    for part in decoder_of(loaded).layers[layer].linears:
        part.weight[::4, ::16] *= 30


def test_outliers_are_counted_over_all_linears_together() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator) ** 6 for shape in ((4, 8), (16, 3))]
    together = sorted(value for part in scores for value in part.flatten().tolist())
    mean = sum(together) / len(together)
    expected = 100 * sum(value > 3 * mean for value in together) / len(together)
    assert outlier_percent(scores, 3) == pytest.approx(expected)
    assert 0 < expected < 100


def test_the_band() -> None:
    percents = torch.tensor([1.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = layer_sparsities(percents, 0.7, 0.08)
    assert float(found.mean()) == pytest.approx(0.7)
    assert float(found.max() - found.min()) == pytest.approx(0.16)
    assert found.argmin() == 1
    assert float(found[2]) == pytest.approx(float(found[0] + found[1]) / 2)
    assert layer_sparsities(torch.ones(3), 0.5, 0.1).tolist() == [0.5] * 3


@pytest.mark.parametrize("host", ["wanda", "sparsegpt", "magnitude", "wanda-sp", "magnitude-sp"])
def test_a_layer_with_outliers_keeps_more_whatever_the_host(host: str) -> None:
    loaded = build()
    plant_outliers(loaded, 3)  # the last: others would pass outliers on to the layers behind them
    applied = Owl(sparsity=0.5, band=0.1, host=host).apply(loaded, calibration=ids())
    assert applied.report.removed_ratio == pytest.approx(0.5, abs=0.02)
    kept = [
        sum(part.weight.count_nonzero().item() for part in layer.linears)
        for layer in decoder_of(applied.loaded).layers
    ]
    assert kept.index(max(kept)) == 3
    total = sum(part.weight.numel() for part in decoder_of(loaded).layers[3].linears)
    densest = applied.report.facts["sparsity of the densest layer"]
    assert 1 - kept[3] / total == pytest.approx(densest, abs=0.02)
    assert densest < 0.4


def test_without_a_band_it_is_its_host() -> None:
    alone = Wanda(sparsity=0.6).apply(build(), calibration=ids()).model
    hosted = Owl(sparsity=0.6, band=0).apply(build(), calibration=ids()).model
    for name, module in linears(alone).items():
        assert torch.equal(module.weight, linears(hosted)[name].weight)


def test_host_parameters_reach_the_host() -> None:
    method = Owl(host="sparsegpt", host_parameters={"block": 32, "damping": 0.1})
    assert (method.hosting.block, method.hosting.damping) == (32, 0.1)
    assert method.hosting.target == method.sparsity


@pytest.mark.parametrize(("host", "extra"), [("wanda", {}), ("armor", {"block": 8, "iterations": 2})])
def test_patterns_of_each_layer_add_up(host: str, extra: dict[str, Any]) -> None:
    loaded = build()
    plant_outliers(loaded, 1)
    method = Owl(sparsity=0.5, band=0.2, group=8, host=host, host_parameters=extra)
    applied = method.apply(loaded, calibration=ids())
    zeros = layer_zeros(applied.model)
    assert [round(8 * share) / 8 for share in zeros] == pytest.approx(zeros, abs=2e-3)
    assert len({round(8 * share) for share in zeros}) > 1
    assert sum(round(8 * share) for share in zeros) == 16
    for name, module in linears(applied.model).items():
        layer = int(name.split("layers.")[1].split(".")[0])
        groups = (module.weight != 0).unflatten(1, (-1, 8)).sum(-1)
        assert int(groups.max()) == 8 - round(8 * zeros[layer])


def test_refusals() -> None:
    with pytest.raises(BadParameter, match="takes no sparsity for each layer"):
        Owl(host="flap").check(build())
    with pytest.raises(BadInput, match="no method called"):
        Owl(host="wandaa").check(build())
    with pytest.raises(BadParameter, match="budget is OWL's"):
        zoo.method("owl", host_parameters={"sparsity": 0.5})
    with pytest.raises(BadParameter, match="pattern"):
        Owl(host="wanda-sp", group=8).check(build())
    loaded = build()
    plant_outliers(loaded, 0)
    with pytest.raises(BadParameter, match="would lose all"):
        Owl(sparsity=0.95, band=0.4).apply(loaded, calibration=ids())


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    applied = Owl(host="wanda-sp", sparsity=0.4).apply(build("tiny-mistral"), calibration=ids())
    again = zoo.load_model(str(applied.save(tmp_path / "owl")))
    assert torch.equal(logits(again.model, ids(2)), logits(applied.model, ids(2)))
