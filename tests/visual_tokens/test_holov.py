"""HoloV: the rule against a slow reference, and its way through the model."""

from __future__ import annotations

import math

import pytest
import torch
from encoder_reference import all_kept, encode, inputs, kept_by
from reference import cast, decoder_call, load

import zoo
from zoo.methods.visual_tokens.holov import HoloV, crop_score


def slow_score(features: list[list[float]], attention: list[float], beta: float) -> float:
    """Score of one crop by sums over single tokens, in float64."""
    size = len(attention)
    if size <= 1:
        return sum(attention)
    unit = [[x / (math.hypot(*row) + 1e-6) for x in row] for row in features]
    similar = [
        [0.0 if i == j else sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for j in range(size)]
        for i in range(size)
    ]
    means = [sum(row) / (size - 1) for row in similar]
    spread = [sum((x - m) ** 2 for x in row) / (size - 1) for row, m in zip(similar, means, strict=True)]
    scaled = [1000 * a for a in attention]
    gamma = (sum(scaled) / size) / (sum(spread) / size + 1e-6)
    return sum(a + beta * gamma * v for a, v in zip(scaled, spread, strict=True)) / size


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_the_score_of_a_crop(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    features, attention = torch.randn(size, 5, generator=generator), torch.rand(size, generator=generator)
    expected = slow_score(features.tolist(), attention.tolist(), 0.09)
    assert crop_score(features, attention, 0.09).item() == pytest.approx(expected, rel=1e-5)


def test_budget_is_met_and_an_overflow_is_given_away() -> None:
    """All attention in one crop of six: it cannot take all that its score earns."""
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(36, 8, generator=generator), torch.full((36,), 1e-4)
    attention[12:18] = 0.1
    attention += 1e-6 * torch.rand(36, generator=generator)
    released = HoloV(redistribute=False).choose(features, attention, 18, 6)
    whole = HoloV().choose(features, attention, 18, 6)
    assert len(released) < 18
    assert len(set(whole.tolist())) == 18
    assert set(released.tolist()) <= set(whole.tolist())
    assert set(range(12, 18)) <= set(whole.tolist())
    crops = [place // 6 for place in whole.tolist()]
    assert crops == sorted(crops)


@pytest.mark.parametrize(("size", "count", "crops"), [(36, 35, 16), (10, 3, 16), (7, 7, 3), (5, 1, None)])
def test_odd_sizes_keep_the_budget(size: int, count: int, crops: int | None) -> None:
    generator = torch.Generator().manual_seed(size)
    kept = HoloV().choose(
        torch.randn(size, 4, generator=generator), torch.rand(size, generator=generator), count, crops
    )
    assert len(set(kept.tolist())) == count


@torch.no_grad()
def test_through_the_model_in_the_order_of_the_release() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 2))
    attention = encode("tiny-llava", data["pixel_values"]).maps[-2][:, :, 0, 1:].mean(1)
    call = decoder_call(loaded, data)
    method = HoloV(keep_tokens=14, crops=4)
    kept = kept_by(loaded, data, method)
    for sample, rows in enumerate(kept):
        visual = data["input_ids"][sample] == loaded.model.config.image_token_id
        features = call["inputs_embeds"][sample, visual]
        scores = [
            slow_score(f.tolist(), a.tolist(), 0.09)
            for f, a in zip(features.split(9), attention[sample].split(9), strict=True)
        ]
        shares = [math.floor(14 * score / sum(scores)) for score in scores]
        for crop in sorted(range(4), key=lambda c: -scores[c])[: 14 - sum(shares)]:
            shares[crop] += 1
        expected = [
            9 * crop + place
            for crop, share in enumerate(shares)
            for place in attention[sample, 9 * crop : 9 * crop + 9].topk(share).indices.tolist()
        ]
        assert max(shares) < 9
        assert rows == expected
    assert kept[0] != sorted(kept[0])


@pytest.mark.parametrize(
    "name", ["tiny-llava-next", "tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-internvl", "tiny-smolvlm"]
)
def test_budget_everywhere(name: str) -> None:
    together = all_kept("holov", name, keep_ratio=0.3)
    loaded = load(name)
    for sample, kept in enumerate(together):
        total = int((inputs(loaded, (sample,))["input_ids"] == loaded.model.config.image_token_id).sum())
        assert len(set(kept)) == len(kept) == round(0.3 * total)
        assert kept == all_kept("holov", name, (sample,), keep_ratio=0.3)[0]


def test_bfloat16() -> None:
    loaded = load("tiny-llava", torch.bfloat16)
    data = cast(inputs(loaded, (0, 1)), torch.bfloat16)
    kept = kept_by(loaded, data, zoo.method("holov", keep_tokens=9))
    assert [len(set(rows)) for rows in kept] == [9, 9]
