"""PyramidDrop against a forward pass by hand, with full attention maps of the layer that comes."""

from __future__ import annotations

import pytest
import torch
from reference import cast, load
from staged import Rule, Sequence, best, inputs, logits_by_hand

import zoo
from zoo.errors import BadParameter


def rule(kept: int, ahead: bool = True) -> Rule:
    def drop(now: Sequence) -> None:
        row = (now.coming() if ahead else now.before)[:, -1].mean(0)
        now.cut([now.visual[number] for number in best(row[now.visual], kept)], renumber=True)

    return drop


@pytest.mark.parametrize("ranked_by", ["next-layer", "last-layer"])
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next", "tiny-internvl"])
def test_equals_a_forward_pass_by_hand(name: str, sample: int, ranked_by: str) -> None:
    loaded = load(name)
    data = inputs(loaded, sample)
    total = int((data["input_ids"] == loaded.anatomy.image_token_id).sum())
    ahead = ranked_by == "next-layer"
    counts = [int(total * 0.6**j) for j in (1, 2, 3)]
    rules = {layer: rule(count, ahead) for layer, count in zip((1, 2, 3), counts, strict=True)}
    expected, left = logits_by_hand(loaded, data, rules)
    assert list(left.values()) == counts
    # Without `layers`, stages are spread evenly: 1, 2, 3 of 4.
    with (
        zoo.method("pyramiddrop", keep_ratio=0.6, ranked_by=ranked_by).apply(loaded) as applied,
        torch.no_grad(),
    ):
        logits = applied(**data).logits[0, -1]
        bars = [bar.kept for bar in applied.report.bars["visual tokens"]]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert bars == [total, *counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_padded_batch_meets_the_budget_and_keeps_the_order(dtype: torch.dtype) -> None:
    loaded = load("tiny-llava", dtype)
    data = cast(inputs(loaded, 0, 1, 2), dtype)
    method = zoo.method("pyramiddrop", layers=[1, 3], keep_ratios=[0.5, 0.1])
    with method.apply(loaded) as applied:
        applied.generate(**data, max_new_tokens=3, do_sample=False)
        kept = applied.kept
        singles = []
        for sample in range(3):
            applied(**cast(inputs(loaded, sample), dtype))
            singles.append(applied.kept[3][0])
    for layer, count in ((1, 18), (3, 3)):  # int(36 * ratio)
        for places in kept[layer]:
            assert len(places) == count
            assert places.tolist() == sorted(places.tolist())
    if dtype == torch.float32:
        lengths = data["attention_mask"].sum(1)
        padding = data["input_ids"].shape[1] - lengths
        assert [(a - p).tolist() for a, p in zip(kept[3], padding, strict=True)] == [
            a.tolist() for a in singles
        ]


def test_every_ratio_of_one_leaves_the_model_as_it_is() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, 0)
    with torch.no_grad():
        dense = loaded.model(**data).logits
        with zoo.method("pyramiddrop", keep_ratio=1).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)


def test_bad_settings_are_refused_in_a_line() -> None:
    for settings in ({"layers": [3, 2]}, {"keep_ratios": [0.5]}, {"keep_ratios": [0.2, 0.5, 0.1]}):
        with pytest.raises(BadParameter):
            zoo.method("pyramiddrop", **settings)
