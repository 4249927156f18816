"""LaCo: merging against the formulas, the walk against a slow one, planted layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from depth import decoder_of, ids, loaded, scale_layer
from torch import nn

from zoo.errors import BadParameter, Refused
from zoo.methods.weights.blockpruner import BlockPruner
from zoo.methods.weights.laco import Collapsed, LaCo, merge, projections

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(layer: Any) -> list[nn.Linear]:
    return [getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name) for name in NAMES]


@torch.no_grad()
def slowly_merged(model: Any, start: int, count: int, rule: str) -> Any:
    """A full copy with ``count`` layers in one. ``released`` subtracts in place, as the authors' code does."""
    other = copy.deepcopy(model)
    stack = other.model.layers
    dense = [[linear.weight.clone() for linear in linears(layer)] for layer in stack]
    base = linears(stack[start])
    for index in range(start + 1, start + count):
        for place, linear in enumerate(base):
            minus = linear.weight.clone() if rule == "released" else dense[start][place]
            linear.weight.add_(dense[index][place] - minus)
    other.model.layers = nn.ModuleList([*stack[: start + 1], *stack[start + count :]])
    other.config.num_hidden_layers = len(other.model.layers)
    return other


@torch.no_grad()
def final(model: Any, windows: torch.Tensor) -> torch.Tensor:
    return model.model(input_ids=windows, use_cache=False).last_hidden_state.flatten(1)


def slow_walk(dense: Any, windows: torch.Tensor, method: LaCo) -> tuple[Any, list[float]]:
    current, similarities = dense, []
    place = dense.config.num_hidden_layers - 1 - method.merge_layers
    while place >= method.low:
        count = min(method.merge_layers, len(current.model.layers) - place)
        tried = slowly_merged(current, place, count, method.rule)
        similarities.append(
            float(torch.cosine_similarity(final(dense, windows), final(tried, windows)).mean())
        )
        if similarities[-1] > method.threshold:
            current = tried
            place -= method.interval
        else:
            place -= 1
    return current, similarities


@pytest.mark.parametrize("rule", ["released", "paper"])
@pytest.mark.parametrize(("layers", "interval", "threshold"), [(2, 1, 0.2), (3, 2, 0.5), (4, 1, -1.0)])
def test_the_walk_is_that_of_a_slow_reference(
    rule: Any, layers: int, interval: int, threshold: float
) -> None:
    model, windows = loaded(num_hidden_layers=7), ids(3)
    method = LaCo(merge_layers=layers, interval=interval, threshold=threshold, rule=rule)
    expected, similarities = slow_walk(model.model, windows, method)
    _, tried = method.collapse(decoder_of(model), windows, batch=2)
    assert tried == pytest.approx(similarities, abs=1e-4)
    applied = method.apply(model, calibration=windows)
    with torch.no_grad():
        found, slow = applied(input_ids=windows).logits, expected(input_ids=windows, use_cache=False).logits
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-4)
    assert applied.model.config.num_hidden_layers == len(expected.model.layers)


def test_the_rules_agree_on_two_layers_and_differ_on_three() -> None:
    decoder = decoder_of(loaded("tiny-qwen2"))  # with biases
    run = [Collapsed(index, projections(layer)) for index, layer in enumerate(decoder.layers)]
    assert any(name.endswith("bias") for name in run[0].projections)
    for count, agree in ((2, True), (3, False)):
        one, other = (merge(run[:count], rule) for rule in ("released", "paper"))  # type: ignore[arg-type]
        assert one.index == other.index == 0
        same = all(
            torch.allclose(one.projections[name], other.projections[name], atol=1e-6)
            for name in one.projections
        )
        assert same == agree


def test_useless_layers_are_taken_in_and_an_important_one_is_not_merged_away() -> None:
    model = loaded(num_hidden_layers=6)
    for index in (3, 4):
        scale_layer(model, index, 0.0)
    scale_layer(model, 2, 20.0)
    applied = LaCo(merge_layers=2, threshold=0.99).apply(model, calibration=ids())
    # Layers 3 and 4 become one; merging layer 2 with it would replace the projections that matter by zeros.
    assert [bar.kept for bar in applied.report.bars["FFN channels"]].count(0) == 1
    with torch.no_grad():
        torch.testing.assert_close(
            applied(input_ids=ids()).logits, model.model(input_ids=ids()).logits, rtol=1e-4, atol=1e-4
        )


def test_frozen_parameters_stay_frozen_and_the_callers_model_keeps_every_bit() -> None:
    model = loaded()
    model.model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    applied = LaCo(merge_layers=3, threshold=-1, rule="paper").apply(model, calibration=ids())
    assert not any(parameter.requires_grad for parameter in applied.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


def test_a_run_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadParameter, match="no run of 4 layers"):
        LaCo(merge_layers=4).apply(loaded(), calibration=ids())
    with pytest.raises(BadParameter, match="no run"):
        LaCo(merge_layers=2, high=9).apply(loaded(), calibration=ids())


def test_layers_of_different_widths_are_refused() -> None:
    pruned = BlockPruner(layers=1).apply(loaded(), calibration=ids()).loaded
    with pytest.raises(Refused, match="one width"):
        LaCo(merge_layers=2).apply(pruned, calibration=ids())
