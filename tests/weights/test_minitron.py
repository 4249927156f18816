"""Minitron: shapes, what stays, the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, build, decoder_of, ids, logits, state

import zoo
from zoo.engines.shapes import candidate_shapes, rank_heads, shape_of
from zoo.errors import BadParameter, Refused
from zoo.methods.weights.minitron import Minitron
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

SEARCH: dict[str, Any] = {"multiple": 4, "max_depth": 0.4, "top_k": 4, "trial_windows": 3}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_given_shape_is_what_comes_out_and_reloads(name: str, tmp_path: Path) -> None:
    loaded = build(name)
    before = state(loaded.model)
    dense = shape_of(decoder_of(loaded))
    assert dense is not None
    assert dense.weights == decoder_of(loaded).prunable_parameters()
    heads = dense.kv_heads if dense.group > 1 else dense.heads - 2
    applied = Minitron(hidden=36, channels=60, heads=heads, layers=2).apply(loaded, calibration=ids())
    shape = shape_of(decoder_of(applied.loaded))
    assert shape == dense.with_parts(hidden=36, channels=60, heads=heads, layers=2)
    assert shape.weights == decoder_of(applied.loaded).prunable_parameters() == applied.report.kept
    if dense.group > 1:
        assert shape.kv_heads == dense.kv_heads
    bars = applied.report.bars
    assert sorted(bar.kept for bar in bars["residual channels"]) == [0, 36, 36]
    batch = ids(2)
    applied.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))  # all layers alike: a plain configuration
    again = zoo.load_model(tmp_path / "saved", device="cpu")
    torch.testing.assert_close(logits(again.model, input_ids=batch), logits(applied.model, input_ids=batch))
    for key, value in state(loaded.model).items():
        assert torch.equal(value, before[key])


def test_what_is_active_stays() -> None:
    """A loud channel in every layer, and a silent layer."""
    loaded = build("llama-gqa")
    layers = decoder_of(loaded).layers
    with torch.no_grad():
        for layer in layers:
            layer.mlp.up.weight[7].mul_(50)
        layers[1].attention.output.weight.mul_(1e-3)
        layers[1].mlp.down.weight.mul_(1e-3)
    applied = Minitron(channels=20, layers=2).apply(loaded, calibration=ids())
    kept = decoder_of(applied.loaded).layers
    assert [layer.input_norm.weight.data_ptr() for layer in kept] == [
        layers[index].input_norm.weight.data_ptr() for index in (0, 2)
    ]
    for layer, index in zip(kept, (0, 2), strict=True):
        assert any(torch.equal(row, layers[index].mlp.up.weight[7]) for row in layer.mlp.up.weight)


def test_heads_are_ranked_within_their_group() -> None:
    importance = torch.tensor([1.0, 9.0, 8.0, 7.0, 3.0, 2.0])
    assert rank_heads(importance, 2).tolist() == [1, 2, 0, 3, 4, 5]
    assert rank_heads(importance, 3).tolist() == [1, 0, 2, 3, 4, 5]


def test_the_search_takes_the_best_of_the_largest_that_fit() -> None:
    loaded = build("llama-mha")
    dense = shape_of(decoder_of(loaded))
    assert dense is not None
    tried: list[int] = []

    class Narrowest(Minitron):
        def quality(self, loaded: LoadedModel, windows: torch.Tensor) -> float:
            decoder = decoder_of(loaded)
            tried.append(decoder.prunable_parameters())
            assert windows.shape == (3, 20)
            return -decoder.layers[0].mlp.width

    applied = Narrowest(sparsity=0.3, **SEARCH).apply(loaded, calibration=ids())
    shapes = candidate_shapes(dense, 0.4, 0.4, 0.4, 4)
    fitting = sorted((s.weights for s in shapes if s.weights <= 0.7 * dense.weights), reverse=True)
    assert tried == fitting[:4]
    assert applied.report.kept in tried
    widths = {s.channels for s in shapes if s.weights in tried}
    assert decoder_of(applied.loaded).layers[0].mlp.width == min(widths)


def test_the_default_quality_is_the_loss_on_the_calibration_text() -> None:
    loaded, windows = build("llama-gqa"), ids()
    with torch.no_grad():
        expected = float(loaded.model(input_ids=windows, labels=windows).loss)
    assert Minitron().quality(loaded, windows) == pytest.approx(-expected)
    applied = Minitron(sparsity=0.2, **SEARCH).apply(loaded, calibration=windows)
    assert applied.report.kept <= 0.8 * applied.report.total


def test_candidates_stay_within_their_bounds() -> None:
    dense = shape_of(decoder_of(build("llama-gqa")))
    assert dense is not None
    for shape in candidate_shapes(dense, 0.25, 0.4, 0.34, 8):
        assert shape.hidden in (40, 48)
        assert shape.channels % 8 == 0
        assert shape.channels >= 48
        assert shape.heads in (6,)  # three of six would be half of them
        assert shape.layers in (2, 3)
        assert shape.kv_heads == 3


def test_what_cannot_be_is_refused_in_one_line() -> None:
    loaded = build("llama-gqa")
    for options, message in (
        ({"heads": 4}, "multiple of 3"),
        ({"hidden": 64}, "at most 48"),
        ({"sparsity": 0.9}, "can leave"),
    ):
        with pytest.raises(BadParameter, match=message):
            zoo.method("minitron", **options).apply(loaded, calibration=ids())
    with pytest.raises(BadParameter, match="not both"):
        zoo.method("minitron", sparsity=0.2, layers=2)
    uneven = zoo.method("llm-pruner", ratio=0.3, keep_first=1, keep_last=1).apply(loaded, calibration=ids())
    with pytest.raises(Refused, match="one shape"):
        Minitron().check(uneven.loaded)
    model, processor = tiny_model("tiny-llava")
    with pytest.raises(Refused, match="leave out hidden"):
        Minitron(hidden=32).check(LoadedModel(model, processor, "tiny-llava"))


def test_half_precision() -> None:
    applied = Minitron(hidden=40, channels=60).apply(build("llama-gqa", torch.bfloat16), calibration=ids())
    assert applied.model.dtype == torch.bfloat16
    assert torch.isfinite(logits(applied.model, input_ids=ids(2)).float()).all()
