"""HiPrune: the rule against a slow reference, and its way through the model."""

from __future__ import annotations

import pytest
import torch
from encoder_reference import all_kept, encode, inputs, kept_by
from reference import cast, load

import zoo
from zoo.errors import Refused
from zoo.methods.visual_tokens.hiprune import HiPrune


def slow_hiprune(
    objects: list[float], registers: list[float], count: int, alpha: float, columns: int
) -> list[int]:
    size = len(objects)
    anchors = sorted(range(size), key=lambda i: -objects[i])[: round(count * alpha / 5)]
    held = {
        min(max(anchor + step, 0), size - 1) for anchor in anchors for step in (0, -1, 1, -columns, columns)
    }
    rest = sorted(set(range(size)) - held, key=lambda i: -registers[i])
    return sorted([*held, *rest[: count - len(held)]])


@pytest.mark.parametrize(("count", "alpha"), [(12, 0.1), (12, 0.5), (20, 1.0), (47, 0.8)])
def test_equals_the_rule_in_plain_loops(count: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(count)
    objects, registers = torch.rand(2, 48, generator=generator) / 48
    before = registers.clone()
    kept = HiPrune(alpha=alpha).choose(objects, registers, count, 8)
    assert len(kept) == count
    assert sorted(kept.tolist()) == slow_hiprune(objects.tolist(), registers.tolist(), count, alpha, 8)
    assert torch.equal(registers, before)


def test_neighbours_at_the_edges() -> None:
    objects = torch.zeros(12)
    objects[8] = 1.0  # first column of the third row of a grid of 3 x 4
    registers = torch.zeros(12)
    wrapped = HiPrune(alpha=1.0).choose(objects, registers, 5, 4)
    assert sorted(wrapped.tolist()) == [4, 7, 8, 9, 11]
    safe = HiPrune(alpha=1.0, edge_safe=True)._around(torch.tensor([8]), 12, 4)
    assert safe.tolist() == [4, 8, 9]
    assert HiPrune(edge_safe=True)._around(torch.tensor([5]), 12, 4).tolist() == [1, 4, 5, 6, 9]
    assert HiPrune(edge_safe=True)._around(torch.tensor([2]), 5, 1).tolist() == [1, 2, 3]


def test_more_neighbours_than_budget_keep_the_budget() -> None:
    """3 tokens at alpha 1: one anchor with four neighbours would be 5."""
    objects = torch.linspace(0, 1, 36)[torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    kept = HiPrune(alpha=1.0).choose(objects, objects, 3, 6)
    assert len(set(kept.tolist())) == 3
    assert int(objects.argmax()) in kept.tolist()


@torch.no_grad()
def test_through_the_model_eager_column_means_decide() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 1, 2))
    maps = encode("tiny-llava", data["pixel_values"]).maps
    objects, registers = (maps[layer].mean((1, 2))[:, 1:] for layer in (1, -2))
    expected = [
        slow_hiprune(o.tolist(), r.tolist(), 15, 0.5, 6) for o, r in zip(objects, registers, strict=True)
    ]
    method = zoo.method("hiprune", keep_tokens=15, alpha=0.5, object_layer=2)
    assert kept_by(loaded, data, method) == expected
    gained = sum(registers[b, rows].sum() for b, rows in enumerate(expected))
    assert gained > sum(row.topk(15, largest=False).values.sum() for row in registers)


@pytest.mark.parametrize(
    "name", ["tiny-llava-next", "tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-internvl", "tiny-smolvlm"]
)
def test_budget_and_order_everywhere(name: str) -> None:
    parameters = {"keep_ratio": 0.4, "alpha": 0.6, "object_layer": 2}
    together = all_kept("hiprune", name, **parameters)
    loaded = load(name)
    for sample, kept in enumerate(together):
        total = int((inputs(loaded, (sample,))["input_ids"] == loaded.model.config.image_token_id).sum())
        assert kept == sorted(set(kept))
        assert len(kept) == round(0.4 * total)
        assert kept == all_kept("hiprune", name, (sample,), **parameters)[0]


def test_bfloat16() -> None:
    loaded = load("tiny-llava", torch.bfloat16)
    data = cast(inputs(loaded, (0, 1)), torch.bfloat16)
    kept = kept_by(loaded, data, zoo.method("hiprune", keep_tokens=9, object_layer=2))
    assert [len(set(rows)) for rows in kept] == [9, 9]


def test_an_object_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match="4 blocks"):
        zoo.method("hiprune").apply(load("tiny-llava"))
