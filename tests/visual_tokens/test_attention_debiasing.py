"""Attention debiasing: the padding mask against counted pixels, the fit, and hosts that get it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import cast, load, picture, visual_places
from staged import Rule, Sequence, best, inputs, logits_by_hand

import zoo
from zoo.engines.correction import fit_trend
from zoo.engines.padding import covers_padding, touches_padding
from zoo.errors import BadInput
from zoo.methods.visual_tokens.attention_debiasing import FASTV_CURVE, AttentionDebiasing


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 500), (512, 512), (1000, 10), (7, 9)])
def test_the_overlap_mask_counts_pixels(width: int, height: int) -> None:
    side, grid = max(width, height), 8
    fine = 40 * grid
    at = (np.arange(fine) + 0.5) / fine * side
    across = (at > (side - width) / 2) & (at < (side + width) / 2)
    down = (at > (side - height) / 2) & (at < (side + height) / 2)
    shown = np.outer(down, across).reshape(grid, 40, grid, 40).mean((1, 3))
    assert np.abs(1 - shown - covers_padding(width, height, grid).numpy()).max() < 0.03
    coarse = touches_padding(width, height, grid)
    assert bool((coarse[covers_padding(width, height, grid) == 0] == 0).all())


def test_the_fit_finds_the_trend_under_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(4000, dtype=torch.float64, generator=generator)
    noise = 1 + 0.2 * torch.randn(4000, dtype=torch.float64, generator=generator)
    for sigma in (-1.5, 0.0, 0.7, 2.4):
        assert fit_trend(place, 0.01 * (sigma * place).exp() * noise) == pytest.approx(sigma, abs=0.06)
        exact = fit_trend(place, 3 * (sigma * place).exp())
        assert exact == pytest.approx(sigma, abs=1e-6)


def test_weights_follow_the_trend_or_the_curve() -> None:
    numbers = torch.arange(576)
    weights = AttentionDebiasing(sigma=2.0).weights(numbers, 576)
    assert weights[0] == 1
    torch.testing.assert_close(weights[1:] / weights[:-1], torch.full((575,), float(np.exp(-2 / 576))))
    curve = AttentionDebiasing(curve=FASTV_CURVE).weights(numbers, 576)
    for step, value in enumerate(FASTV_CURVE[:-1]):
        assert float(curve[72 * step]) == pytest.approx(value)
    assert bool((curve[1:] < curve[:-1]).all())


def debiased_fastv(kept: int, sigma: float, padding: set[int]) -> Rule:
    def drop(now: Sequence) -> None:
        row = now.before[:, -1].mean(0)[now.visual]
        number = torch.arange(len(row))
        score = torch.exp(-sigma * number / len(row)) * row
        shown = [n for n in range(len(row)) if n not in padding]
        chosen = [shown[n] for n in best(score[shown], min(kept, len(shown)))]
        now.cut([now.visual[n] for n in chosen], renumber=False)

    return drop


def padded_inputs(loaded: Any) -> dict[str, Any]:
    """A picture of half the width, in the middle of a square of one colour."""
    data = inputs(loaded, 1)
    data["pixel_values"][..., :12] = data["pixel_values"][..., 36:] = 0.25
    return data


PADDED = {6 * row + column for row in range(6) for column in (0, 5)}
"""Patches of 8 pixels: columns 1 and 4 of 6 are half covered, which is not more than 0.5."""


@pytest.mark.parametrize("kept", [8, 30])
def test_equals_a_forward_pass_by_hand(kept: int) -> None:
    loaded = load("tiny-llava")
    data = padded_inputs(loaded)
    expected, left = logits_by_hand(loaded, data, {2: debiased_fastv(kept, 1.7, PADDED)})
    stack = zoo.method("fastv+attention-debiasing", keep_tokens=kept, sigma=1.7, layer=2)
    with stack.apply(loaded) as applied, torch.no_grad():
        logits = applied(**data).logits[0, -1]
        places = applied.layers[0].kept[2][0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(places) == left[2] == min(kept, 24)
    visual = visual_places(loaded, data["input_ids"][0]).tolist()
    assert not {visual.index(place) for place in places.tolist()} & PADDED


def test_alone_it_runs_its_host() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, 0, 1, 2)
    alone = zoo.method(
        "attention-debiasing", host="pyramiddrop", host_parameters={"keep_ratio": 0.6}, sigma=2.0
    )
    stack = zoo.method("pyramiddrop+attention-debiasing", keep_ratio=0.6, sigma=2.0)
    plain = zoo.method("pyramiddrop", keep_ratio=0.6)
    tokens, names = [], []
    for method in (alone, stack, plain):
        with method.apply(loaded) as applied:
            tokens.append(applied.generate(**data, max_new_tokens=6, do_sample=False).tolist())
            names.append(applied.reports[0].method)
    assert names == ["attention-debiasing", "pyramiddrop+attention-debiasing", "pyramiddrop"]
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("host", ["fastv", "pyramiddrop", "sparsevlm", "fitprune"])
def test_a_trend_that_outweighs_attention_keeps_the_first_tokens(host: str) -> None:
    """Better than inverted: with a large sigma early tokens stay, with a large negative one late ones."""
    loaded = load("tiny-llava")
    settings: dict[str, Any] = {
        "fastv": {"keep_ratio": 0.25},
        "pyramiddrop": {"keep_ratio": 0.5},
        "sparsevlm": {"layers": [0], "counts": [9]},
        "fitprune": {"counts": [20, 0, 0, 0], "fitted_on": 36},
    }[host]
    means = []
    for sigma in (200.0, -200.0):
        method = zoo.method("attention-debiasing", host=host, host_parameters=settings, sigma=sigma)
        with method.apply(loaded) as applied, torch.no_grad():
            applied(**inputs(loaded, 1))
            first = min(applied.kept)
            means.append(float(applied.kept[first][0].float().mean()))
    assert means[0] < means[1]


def test_the_fit_removes_a_trend_that_was_there() -> None:
    loaded = load("tiny-llava")
    samples = [inputs(loaded, number) for number in range(3)]
    fitted = AttentionDebiasing.fit(loaded, samples, host_parameters={"keep_ratio": 0.5})
    assert fitted.sigma is not None
    rows = []
    for data in samples:
        logits_by_hand(loaded, data, {2: lambda now: rows.append(now.before[:, -1].mean(0)[now.visual])})
    mean = torch.stack(rows).mean(0).double()
    assert fitted.sigma == pytest.approx(fit_trend(torch.arange(36).double() / 36, mean), abs=1e-3)
    with pytest.raises(BadInput, match="at least one sample"):
        AttentionDebiasing.fit(loaded, [])


def test_hosts_that_do_not_look_at_the_text_are_refused() -> None:
    with pytest.raises(BadInput, match="divprune cannot be changed by it"):
        zoo.method("divprune+attention-debiasing")
    with pytest.raises(BadInput, match="divprune does not"):
        zoo.method("attention-debiasing", host="divprune").check(load("tiny-llava"))
    with pytest.raises(BadInput, match="attention-debiasing does not"):
        zoo.method("attention-debiasing", host="attention-debiasing").check(load("tiny-llava"))
    with pytest.raises(BadInput, match="fastv has no parameter 'keep'"):
        zoo.method("attention-debiasing", host_parameters={"keep": 1}).check(load("tiny-llava"))


def test_a_third_method_beside_host_and_correction_stays_as_it_is() -> None:
    loaded = load("tiny-llava", torch.bfloat16)
    stack = zoo.method(
        "divprune+fastv+attention-debiasing", **{"divprune.keep_ratio": 0.5, "fastv.keep_ratio": 0.5}
    )
    with stack.apply(loaded) as applied:
        applied.generate(**cast(inputs(loaded, 0, 1), torch.bfloat16), max_new_tokens=3, do_sample=False)
        names = [report.method for report in applied.reports]
    assert names == ["divprune", "fastv+attention-debiasing"]


def test_a_picture_without_padding_is_left_alone() -> None:
    loaded = load("tiny-llava")
    data = dict(loaded.processor(text="<image>?", images=picture(2, 48, 48), return_tensors="pt"))
    with zoo.method("attention-debiasing", sigma=0.0).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        corrected = applied.kept[2][0]
    with zoo.method("fastv").apply(loaded) as applied, torch.no_grad():
        applied(**data)
        assert applied.kept[2][0].tolist() == corrected.tolist()
