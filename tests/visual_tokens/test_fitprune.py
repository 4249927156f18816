"""FitPrune against a forward pass by hand, and its fit against the procedure of the release, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from reference import cast, load
from staged import Rule, Sequence, best, inputs, logits_by_hand

import zoo
from zoo.engines.attention_mass import layer_flops
from zoo.errors import BadInput
from zoo.methods.visual_tokens.fitprune import RECIPES, FitPrune, between, stretched
from zoo.models import LoadedModel


def received(now: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over text rows and visual rows of the strongest head's map."""
    strongest = now.before.max(0).values
    return strongest[now.visual[-1] + 1 :].sum(0)[now.visual], strongest[now.visual].sum(0)[now.visual]


def deleting(count: int) -> Rule:
    def delete(now: Sequence) -> None:
        cross, mutual = received(now)
        kept = best(cross * mutual, len(now.visual) - count)
        now.cut([now.visual[number] for number in kept], renumber=False)

    return delete


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next", "tiny-internvl"])
def test_equals_a_forward_pass_by_hand(name: str, sample: int) -> None:
    loaded = load(name)
    data = inputs(loaded, sample)
    total = int((data["input_ids"] == loaded.anatomy.image_token_id).sum())
    counts = [total // 4, 0, total // 3, 0]
    expected, left = logits_by_hand(loaded, data, {1: deleting(counts[0]), 3: deleting(counts[2])})
    method = zoo.method("fitprune", counts=counts, fitted_on=total)
    with method.apply(loaded) as applied, torch.no_grad():
        logits = applied(**data).logits[0, -1]
        bars = [bar.kept for bar in applied.report.bars["visual tokens"]]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert bars == [total, left[1], left[1], left[3]]


# --- the fit ----------------------------------------------------------------------------------------------------


def prefix(values: torch.Tensor, floor: float) -> set[int]:
    """The release's scan: tokens in ascending order, until too little would be left."""
    order = sorted(range(len(values)), key=lambda number: float(values[number]))
    for number in range(len(order) + 1):
        if float(values.sum()) - sum(float(values[i]) for i in order[:number]) < floor:
            return set(order[: max(number - 1, 0)])
    return set(order[:-1])


def slow_fit(
    loaded: LoadedModel, samples: list[Mapping[str, Any]], keep_ratio: float, tolerance: float
) -> tuple[int, ...]:
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    depth, hidden, width = len(decoder.layers), decoder.hidden_size, decoder.layers[0].mlp.width

    def run(data: Mapping[str, Any], alpha: float | None, mass: dict[int, tuple[float, float]]) -> list[int]:
        gone = []

        def behind(layer: int) -> Rule:
            def delete(now: Sequence) -> None:
                cross, mutual = received(now)
                cross = cross / (len(now.hidden) - now.visual[-1] - 1)
                mutual = mutual / len(now.visual)
                if alpha is None:
                    mass[layer] = float(cross.sum()), float(mutual.sum())
                    return
                some, more = (v * (1 - alpha) for v in mass[layer])
                out = prefix(cross, some) & prefix(mutual, more)
                gone.append(len(out))
                now.cut([place for n, place in enumerate(now.visual) if n not in out], renumber=False)

            return delete

        logits_by_hand(loaded, data, {layer + 1: behind(layer) for layer in range(depth - 1)})
        return gone

    known: list[dict[int, tuple[float, float]]] = [{} for _ in samples]
    for data, mass in zip(samples, known, strict=True):
        run(data, None, mass)
    total = int((samples[0]["input_ids"] == loaded.anatomy.image_token_id).sum())
    dense = depth * layer_flops(total, hidden, width)
    low, high, found = 0.0, 1.0, None
    while high - low > tolerance:
        alpha = (low + high) / 2
        gone = [run(data, alpha, mass) for data, mass in zip(samples, known, strict=True)]
        scheme, reached = [0] * depth, False
        spent, left = 0.0, [total] * len(samples)
        for layer in range(depth):
            now = sum(layer_flops(n, hidden, width) for n in left) / len(samples)
            if spent + now * (depth - layer) <= dense * keep_ratio:
                reached = True
                break
            spent += now
            if layer < depth - 1:
                scheme[layer] = sum(counts[layer] for counts in gone)
                left = [n - counts[layer] for n, counts in zip(left, gone, strict=True)]
        if reached:
            high, found = alpha, scheme
        else:
            low = alpha
    assert found is not None
    return tuple(count // len(samples) for count in found)


@pytest.mark.parametrize("keep_ratio", [0.75, 0.5])
def test_the_fit_equals_the_slow_one(keep_ratio: float) -> None:
    loaded = load("tiny-llava")
    samples = [inputs(loaded, number) for number in (0, 1)]
    fitted = FitPrune.fit(loaded, samples, keep_ratio=keep_ratio, tolerance=0.05)
    assert fitted.counts == slow_fit(loaded, samples, keep_ratio, 0.05)
    assert fitted.fitted_on == 36
    assert fitted.counts is not None
    assert sum(fitted.counts) > 0
    with fitted.apply(loaded) as applied:
        applied(**samples[0])
        left = [bar.kept for bar in applied.report.bars["visual tokens"]]
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    share = sum(layer_flops(n, 64, 128) for n in left) / (4 * layer_flops(36, 64, 128))
    assert share == pytest.approx(keep_ratio, abs=0.15)  # counts are whole, and rounded down


def test_fitting_wants_single_samples() -> None:
    loaded = load("tiny-llava")
    with pytest.raises(BadInput, match="at least one sample"):
        FitPrune.fit(loaded, [])
    with pytest.raises(BadInput, match="one sample at a time"):
        FitPrune.fit(loaded, [inputs(loaded, 0, 1)])
    with pytest.raises(BadInput, match="keep_ratio"):
        FitPrune.fit(loaded, [inputs(loaded, 0)], keep_ratio=0)


# --- recipes ----------------------------------------------------------------------------------------------------


def test_released_recipes_are_used_as_they_are_and_deletions_ascend_between_them() -> None:
    assert between(RECIPES, 0.4) == RECIPES[0.4]
    assert between(RECIPES, 0.1) == RECIPES[0.1]
    sums = [sum(between(RECIPES, ratio)) for ratio in (1.0, 0.8, 0.6, 0.4, 0.25, 0.1)]
    assert sums == sorted(sums)
    assert sums[0] == 0
    for depth in (4, 16, 28, 40):
        moved = stretched(RECIPES[0.4], depth)
        assert len(moved) == depth
        assert sum(moved) == sum(RECIPES[0.4])


def test_keep_ratio_of_one_leaves_the_model_as_it_is() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, 0)
    with torch.no_grad():
        dense = loaded.model(**data).logits
        with zoo.method("fitprune", keep_ratio=1).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_padded_batch_loses_what_the_recipe_says(dtype: torch.dtype) -> None:
    """Counts for 576 tokens on 36: a sixteenth, in sum never more than one token off."""
    loaded = load("tiny-llava", dtype)
    with zoo.method("fitprune").apply(loaded) as applied:
        applied.generate(**cast(inputs(loaded, 0, 1, 2), dtype), max_new_tokens=3, do_sample=False)
        kept = applied.kept
    gone = [sum(stretched(RECIPES[0.4], 4)[: layer + 1]) for layer in range(3)]
    for layer, places in kept.items():
        for row in places:
            assert len(row) == 36 - gone[layer - 1] * 36 // 576
            assert row.tolist() == sorted(row.tolist())
