"""The information horizon: measured against full forward passes; the random stage, alone and stacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import load, picture, visual_places

import zoo
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import BadInput
from zoo.methods.visual_tokens._token_information import (
    Information,
    most_informative,
    token_information,
    windows,
)
from zoo.methods.visual_tokens.information_horizon import InformationHorizon, random_choice
from zoo.models import LoadedModel


def inputs(loaded: LoadedModel) -> dict[str, Any]:
    return dict(
        loaded.processor(text=["Look: <image> What is it?"], images=[picture(1)], return_tensors="pt")
    )


def with_only(loaded: LoadedModel, data: dict[str, Any], layer: int, kept: list[int], answer: int) -> float:
    def rule(view: View) -> Keep:
        return Keep(torch.tensor([kept], dtype=torch.long))

    reducer = TokenReducer(loaded.anatomy, [Stage(layer, rule)], "keep", "test")
    try:
        with torch.no_grad():
            return float(loaded.model(**data).logits[0, -1].double().softmax(-1)[answer])
    finally:
        reducer.close()


def hooks_after_a_pass(loaded: LoadedModel, data: dict[str, Any]) -> int:
    """Hooks on all modules (transformers sets some of its own in the first pass)."""
    with torch.no_grad():
        loaded.model(**data)
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl", "tiny-qwen3-vl"])
@pytest.mark.parametrize("window", [1, 2])
def test_information_equals_full_passes(name: str, window: int) -> None:
    loaded = load(name)
    data = inputs(loaded)
    number = len(visual_places(loaded, data["input_ids"][0]))
    answer = 7
    hooks = hooks_after_a_pass(loaded, data)
    found = token_information(loaded, data, answer, layers=[1, 3], window=window, batch=3)
    assert found.alone.shape == (2, number)
    for row, layer in enumerate(found.layers):
        expected = with_only(loaded, data, layer, [], answer)
        assert float(found.without[row]) == pytest.approx(expected, rel=1e-4)
        for token in (0, number // 2, number - 1):
            together = (found.alone[row] == found.alone[row, token]).nonzero().squeeze(-1).tolist()
            assert len(together) <= window * window
            expected = with_only(loaded, data, layer, together, answer)
            assert float(found.alone[row, token]) == pytest.approx(expected, rel=1e-4)
    assert hooks_after_a_pass(loaded, data) == hooks


def test_windows_cover_every_token_of_any_grid_once() -> None:
    for rows, columns, size in ((4, 6, 2), (3, 5, 2), (1, 1, 2), (5, 5, 3)):
        found = windows(rows, columns, size)
        assert sorted(torch.cat(found).tolist()) == list(range(rows * columns))
        for group in found:
            y, x = group // columns, group % columns
            assert len({*(y // size).tolist()}) == len({*(x // size).tolist()}) == 1
    assert windows(4, 4, 2)[1].tolist() == [8, 9, 12, 13]  # down first, then across


def test_windows_need_one_grid() -> None:
    loaded = load("tiny-llava-next")
    with pytest.raises(BadInput, match="window=1"):
        token_information(loaded, inputs(loaded), 7)
    assert token_information(loaded, inputs(loaded), 7, layers=[3], window=1).gain.isfinite().all()


def test_the_oracle_keeps_what_tells_most() -> None:
    alone = torch.tensor([0.1, 0.5, 0.1, 0.4, 0.1])
    assert most_informative(alone, 2).tolist() == [1, 3]
    assert most_informative(alone, 3).tolist() == [0, 1, 3]


def test_the_horizon_is_the_first_layer_without_information() -> None:
    without = torch.tensor([0.2, 0.2, 0.2], dtype=torch.float64)
    alone = without.unsqueeze(1) + torch.tensor([[0.1, -0.1], [1e-4, -1e-4], [0.0, 0.0]])
    assert Information((4, 8, 12), alone, without).horizon() == 8
    assert Information((4, 8, 12), alone, without).horizon(1e-6) == 12
    assert Information((4,), alone[:1], without[:1]).horizon() is None


def test_the_choice_is_uniform_and_depends_on_the_seed_alone() -> None:
    hits = torch.zeros(12)
    for seed in range(600):
        chosen = random_choice(12, 3, seed)
        assert len(set(chosen.tolist())) == 3
        hits[chosen] += 1
    assert hits.min() > 100  # 150 expected, standard deviation 11
    assert hits.max() < 200
    assert random_choice(50, 9, 4).tolist() == random_choice(50, 9, 4).tolist()
    assert random_choice(50, 9, 4).tolist() != random_choice(50, 9, 5).tolist()


@pytest.mark.parametrize(("keep_tokens", "deep"), [(None, 0), (3, 3), (0, 0)])
def test_stacked_on_an_early_pruner(keep_tokens: int | None, deep: int) -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded)
    parameters: dict[str, Any] = {"divprune.keep_ratio": 0.4, "information-horizon.layer": 3}
    if keep_tokens is not None:
        parameters["information-horizon.keep_tokens"] = keep_tokens
    number = len(visual_places(loaded, data["input_ids"][0]))
    early = round(0.4 * number)
    with zoo.method("divprune+information-horizon", **parameters).apply(loaded) as applied:
        with torch.no_grad():
            cache = applied(**data, use_cache=True).past_key_values
        reducer = applied.layers[0].reducer
    late = max(1, round(0.134 * early)) if keep_tokens is None else deep
    text = data["input_ids"].shape[1] - number
    assert [layer.get_seq_length() for layer in cache.layers] == [text + early] * 3 + [text + late]
    assert set(reducer.kept[3][0].tolist()) <= set(reducer.kept[-1][0].tolist())
    assert reducer.kept[3][0].tolist() == sorted(reducer.kept[3][0].tolist())


def test_the_default_layer_is_that_of_the_paper() -> None:
    loaded = load("tiny-llava")
    assert [stage.layer for stage in InformationHorizon().stages(loaded.anatomy)] == [4 * 5 // 8]
    assert InformationHorizon(keep_ratio=1).stages(loaded.anatomy) == []
    # 38 of 284, the paper's own schedule for an average of 192 tokens
    assert InformationHorizon().count(284) == 38


def test_fitting_puts_the_layer_at_the_horizon_of_all_samples() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded)
    with torch.no_grad():
        answer = int(loaded.model(**data).logits[0, -1].argmax())
    measured = token_information(loaded, data, answer)
    assert torch.equal(token_information(loaded, data).alone, measured.alone)
    told = measured.gain.abs().mean(1)
    threshold = float(told.min()) * 1.01
    method = InformationHorizon.fit(loaded, [data, data], threshold=threshold, keep_tokens=3)
    assert method == InformationHorizon(layer=measured.layers[int(told.argmin())], keep_tokens=3)
    with pytest.raises(BadInput, match="raise it"):
        InformationHorizon.fit(loaded, [data], threshold=float(told.min()) * 0.99)
    with pytest.raises(BadInput, match="at least one sample"):
        InformationHorizon.fit(loaded, [])
