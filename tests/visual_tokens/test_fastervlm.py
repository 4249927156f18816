"""FasterVLM and VisPruner: the rule against slow references, and its way through the model."""

from __future__ import annotations

import pytest
import torch
from encoder_reference import all_kept, encode, inputs, kept_by
from reference import cast, load, picture

import zoo
from zoo.engines.selection import thin_out_by_matching
from zoo.methods.visual_tokens.fastervlm import FasterVLM


def slow_vispruner(attention: list[float], features: torch.Tensor, count: int, rho: float) -> set[int]:
    """Section 3.3 with lists and loops, in float64."""
    order = sorted(range(len(attention)), key=lambda i: -attention[i])
    important = int(count * rho)
    rest, wanted = order[important:], count - important
    unit = features.double() / features.double().norm(dim=-1, keepdim=True)
    while wanted and len(rest) > wanted:
        even, odd = rest[::2], rest[1::2]
        closest = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
        even.sort(key=lambda i: -closest[i])
        rest = even[min(8, len(rest) - wanted) :] + odd
    return {*order[:important], *(rest if wanted else [])}


@pytest.mark.parametrize(("size", "count", "rho"), [(36, 9, 0.5), (37, 8, 0.25), (41, 40, 0.5), (20, 1, 0.0)])
def test_vispruner_equals_the_rule_in_plain_loops(size: int, count: int, rho: float) -> None:
    generator = torch.Generator().manual_seed(size)
    attention = torch.rand(size, generator=generator)
    features = torch.randn(size, 12, generator=generator)
    kept = FasterVLM(important_ratio=rho).choose(attention, features, count)
    assert len(kept) == count
    assert set(kept.tolist()) == slow_vispruner(attention.tolist(), features, count, rho)


def test_duplicates_leave_first() -> None:
    """Three groups of near-equal vectors: what is left has one of each, and the inverse rule would not."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.eye(3).repeat_interleave(8, dim=0) + 0.01 * torch.randn(24, 3, generator=generator)
    unit = torch.nn.functional.normalize(groups, dim=-1)
    for seed in range(5):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        left = thin_out_by_matching(order, unit @ unit.T, 6, at_once=2)
        assert {int(token) // 8 for token in left} == {0, 1, 2}


@torch.no_grad()
def test_through_the_model_the_eager_class_row_decides() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 1, 2))
    maps = encode("tiny-llava", data["pixel_values"]).maps
    scores = maps[-2][:, :, 0, 1:].mean(1)
    expected = [sorted(row.topk(11).indices.tolist()) for row in scores]
    kept = kept_by(loaded, data, zoo.method("fastervlm", keep_tokens=11))
    assert kept == expected
    gained = sum(scores[b, rows].sum() for b, rows in enumerate(kept))
    inverted = sum(row.topk(11, largest=False).values.sum() for row in scores)
    assert gained > inverted


@torch.no_grad()
def test_vispruner_looks_at_the_projected_layer() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (1,))
    run = encode("tiny-llava", data["pixel_values"])
    attention, features = run.maps[-2][0, :, 0, 1:].mean(0), run.states[-2][0, 1:]
    expected = slow_vispruner(attention.tolist(), features, 10, 0.5)
    kept = kept_by(loaded, data, zoo.method("fastervlm", keep_tokens=10, important_ratio=0.5))
    assert kept == [sorted(expected)]


@pytest.mark.parametrize("rho", [1.0, 0.5])
@pytest.mark.parametrize(
    "name", ["tiny-llava-next", "tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-internvl", "tiny-smolvlm"]
)
def test_budget_and_order_everywhere(name: str, rho: float) -> None:
    together = all_kept("fastervlm", name, keep_ratio=0.3, important_ratio=rho)
    loaded = load(name)
    for sample, kept in enumerate(together):
        assert kept == sorted(set(kept))
        total = int((inputs(loaded, (sample,))["input_ids"] == loaded.model.config.image_token_id).sum())
        assert len(kept) == round(0.3 * total)
        assert kept == all_kept("fastervlm", name, (sample,), keep_ratio=0.3, important_ratio=rho)[0]


def test_bfloat16() -> None:
    loaded = load("tiny-llava", torch.bfloat16)
    data = cast(inputs(loaded, (0, 1)), torch.bfloat16)
    for rho in (1.0, 0.5):
        kept = kept_by(loaded, data, zoo.method("fastervlm", keep_tokens=9, important_ratio=rho))
        assert [len(set(rows)) for rows in kept] == [9, 9]


def test_newline_tokens_leave_and_crops_share_evenly() -> None:
    loaded = load("tiny-llava-next")
    data = dict(loaded.processor(text="<image>?", images=picture(0, 96, 96), return_tensors="pt"))
    assert data["pixel_values"].shape[1] == 5  # four tiles, and nothing is cut off from them
    (kept,) = kept_by(loaded, data, zoo.method("fastervlm", keep_tokens=20))
    thumbnail = [place for place in kept if place < 36]
    rows = [divmod(place - 36, 13) for place in kept if place >= 36]  # 12 tokens and a newline
    assert max(column for _, column in rows) < 12
    tiles = [2 * (row // 6) + column // 6 for row, column in rows]
    assert [len(thumbnail), *(tiles.count(tile) for tile in range(4))] == [4, 4, 4, 4, 4]
