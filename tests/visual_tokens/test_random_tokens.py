"""Random tokens: budgets, places, and that chance is fair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import load, picture, visual_places

import zoo
from zoo.engines.tokens import View
from zoo.errors import BadParameter
from zoo.methods.visual_tokens.random_tokens import RandomTokens, strided
from zoo.models import LoadedModel


def inputs(loaded: LoadedModel, *texts: str) -> dict[str, Any]:
    given = list(texts or ("<image>\nWhat is it?",))
    pictures = [picture(number, 90, 50) for number in range(len(given))]
    return dict(loaded.processor(text=given, images=pictures, return_tensors="pt", padding=True))


def run(loaded: LoadedModel, data: dict[str, Any], **parameters: Any) -> dict[int, list[list[int]]]:
    with zoo.method("random-tokens", **parameters).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        return {layer: [row.tolist() for row in rows] for layer, rows in applied.kept.items()}


@pytest.mark.parametrize(
    ("rounding", "exact"), [("floor", math.floor), ("round", round), ("ceil", math.ceil)]
)
def test_the_budget_is_met_with_the_rounding_asked_for(rounding: str, exact: Any) -> None:
    for tokens in (1, 7, 36, 576):
        for ratio in (0.01, 0.111, 0.5, 0.999):
            method = RandomTokens(keep_ratio=ratio, rounding=rounding, schedule={})
            assert method.number(tokens, -1) == max(1, exact(tokens * ratio))
            assert RandomTokens(schedule={2: ratio}, rounding=rounding).number(tokens, 2) == exact(
                tokens * ratio
            )


def test_every_token_has_the_same_chance() -> None:
    method = RandomTokens(keep_ratio=0.25)
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(16)
    for _ in range(800):
        drawn = method.draw([torch.arange(16)], -1, generator)
        assert len(set(drawn.tolist())) == 4
        hits[drawn] += 1
    assert hits.min() > 150  # 200 expected, standard deviation 12
    assert hits.max() < 250


def test_order_and_seed() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded)
    first = run(loaded, data, keep_tokens=12)[-1][0]
    assert first == sorted(first)
    assert first == run(loaded, data, keep_tokens=12)[-1][0]
    assert first != run(loaded, data, keep_tokens=12, seed=1)[-1][0]
    drawn = run(loaded, data, keep_tokens=12, order="permutation")[-1][0]
    assert drawn != sorted(drawn)
    assert sorted(drawn) == first


def test_successive_cuts_refer_to_what_arrives() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, "<image>\nWhat is it?", "So many words about this: <image>?")
    number = len(visual_places(loaded, data["input_ids"][0]))
    kept = run(loaded, data, schedule={0: 0.5, 2: 0.3, 3: 0})
    halves = number // 2
    for sample in range(2):
        assert [len(kept[layer][sample]) for layer in (-1, 2, 3)] == [halves, int(halves * 0.3), 0]
        assert set(kept[2][sample]) <= set(kept[-1][sample])


@pytest.mark.parametrize("name", ["tiny-llava-next", "tiny-internvl", "tiny-smolvlm"])
def test_thumbnails_are_sampled_apart(name: str) -> None:
    loaded = load(name)
    data = inputs(loaded)
    thumbnail: list[int] = []

    class Looking(RandomTokens):
        def select(self, view: View) -> Any:
            flags = torch.zeros(len(view.tokens), dtype=torch.bool)
            for image in view.images:
                flags[image.tokens] = image.thumbnail
            thumbnail.extend(view.original[flags].tolist())
            return super().select(view)

    with Looking(keep_ratio=0.3).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        kept = applied.kept[-1][0].tolist()
    others = len(visual_places(loaded, data["input_ids"][0])) - len(thumbnail)
    assert thumbnail
    assert others
    small = len(set(kept) & set(thumbnail))
    assert small == max(1, int(0.3 * len(thumbnail)))
    assert len(kept) - small == max(1, int(0.3 * others))


def test_a_regular_stride() -> None:
    assert strided(12, 3).tolist() == [2, 6, 10]
    assert strided(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert strided(5, 0).tolist() == []
    for tokens in (7, 36, 576):
        for number in (1, 2, 5, 7):
            gaps = strided(tokens, number).diff()
            assert number == 1 or int(gaps.max() - gaps.min()) <= 1
    loaded = load("tiny-llava")
    data = inputs(loaded)
    assert run(loaded, data, mode="grid", seed=1) == run(loaded, data, mode="grid", seed=2)


@pytest.mark.parametrize(
    "wrong", [{"schedule": {-1: 0.5, 0: 0.5}}, {"schedule": {2: 1.5}}, {"layer": -2}, {"keep_ratio": 0}]
)
def test_bad_parameters_are_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadParameter) as caught:
        zoo.method("random-tokens", **wrong)
    assert "\n" not in str(caught.value)


def test_keeping_everything_makes_no_stage() -> None:
    anatomy = load("tiny-llava").anatomy
    assert RandomTokens(keep_ratio=1).stages(anatomy) == []
    assert RandomTokens(schedule={-1: 1, 2: 1}).stages(anatomy) == []
    assert [stage.layer for stage in RandomTokens(layer=0).stages(anatomy)] == [-1]
