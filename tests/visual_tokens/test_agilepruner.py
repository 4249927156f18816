"""AgilePruner: a walk by attention in which kept tokens suppress their near-duplicates."""

from __future__ import annotations

import pytest
import torch
from reference import ARCHITECTURES, load, picture, visual_places

import zoo
from zoo.errors import BadInput
from zoo.methods.visual_tokens.agilepruner import (
    AgilePruner,
    average_effective_rank,
    effective_rank,
    suppressed_walk,
)


def by_the_paper(
    features: torch.Tensor, attention: torch.Tensor, count: int, average: float, cap: float
) -> list[int]:
    """The published rule, token by token, with singular values and all distances in float64."""
    features = features.double()
    sigma = torch.linalg.svdvals(features)
    share = sigma / sigma.sum()
    rank = float((-(share * share.log()).nan_to_num().sum()).exp())
    distance = 1 - torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    order = sorted(range(len(features)), key=lambda token: -float(attention[token]))
    kept: list[int] = []
    removed: list[int] = []
    for number, token in enumerate(order, start=1):
        if token in removed or len(kept) == count:
            continue
        kept.append(token)
        threshold = min(number * rank / average * 0.01, cap)
        removed += [
            other for other in order[number:] if other not in removed and distance[token, other] < threshold
        ]
    return (kept + [token for token in order if token in removed])[:count]


@pytest.mark.parametrize(("average", "cap"), [(95.0, 0.5), (1.0, 0.9), (0.5, 2.0), (20.0, 0.05)])
def test_picks_are_those_of_the_published_rule(average: float, cap: float) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(5, 8, generator=generator).repeat(8, 1) + 0.4 * torch.randn(
        40, 8, generator=generator
    )
    attention = torch.rand(40, generator=generator)
    method = AgilePruner(average_rank=average, max_threshold=cap)
    assert method.order(features, attention, 15).tolist() == by_the_paper(
        features, attention, 15, average, cap
    )


def test_an_exhausted_walk_goes_on_with_what_was_removed_by_attention() -> None:
    features = torch.ones(6, 3)
    attention = torch.tensor([0.1, 0.5, 0.3, 0.6, 0.2, 0.4])
    order = suppressed_walk(features, attention, torch.full((6,), 0.5), 4)
    assert order.tolist() == [3, 1, 5, 2]


def test_near_duplicates_make_room_and_inverted_attention_does_worse() -> None:
    features = torch.eye(20)
    important = [4, 8, 15]
    attention = torch.linspace(0, 0.1, 20)
    attention[important] = torch.tensor([1.0, 0.9, 0.8])
    features[9] = features[8]  # a copy of an important token
    attention[9] = 0.85
    method = AgilePruner()
    assert sorted(method.order(features, attention, 3).tolist()) == important
    assert not set(important) & set(method.order(features, -attention, 3).tolist())


def test_complex_pictures_suppress_more_than_simple_ones() -> None:
    generator = torch.Generator().manual_seed(5)
    complex_, simple = torch.randn(50, 32, generator=generator), torch.randn(50, 1, generator=generator)
    simple = simple * torch.ones(50, 32) + 0.01 * complex_
    assert effective_rank(complex_) > 5 * effective_rank(simple)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(3, 4)) == pytest.approx(1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_order_is_kept_and_the_budget_met_on_every_architecture(name: str) -> None:
    loaded = load(name)
    data = loaded.processor(
        text=["<image> What?", "A longer question: <image>"],
        images=[picture(1), picture(2, 40, 110)],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad(), zoo.method("agilepruner", keep_ratio=0.4).apply(loaded) as applied:
        applied(**data)
        for sample, kept in enumerate(applied.kept[-1]):
            visual = visual_places(loaded, data["input_ids"][sample])
            assert kept.tolist() == sorted(set(kept.tolist()))
            assert set(kept.tolist()) <= set(visual.tolist())
            assert len(kept) == round(0.4 * len(visual))


def test_the_average_rank_is_measured_on_the_layer_that_is_projected() -> None:
    loaded = load("tiny-llava")
    inputs = [
        loaded.processor(text=["<image> What?"], images=[picture(number)], return_tensors="pt")
        for number in (1, 2)
    ]
    expected = []
    for data in inputs:
        with torch.no_grad():
            states = loaded.model.model.vision_tower(
                data["pixel_values"], output_hidden_states=True
            ).hidden_states[-2]
        share = torch.linalg.svdvals(states[0, 1:].double())
        share = share / share.sum()
        expected.append(float((-(share * share.log()).sum()).exp()))
    assert average_effective_rank(loaded, inputs) == pytest.approx(sum(expected) / 2, rel=1e-6)
    with pytest.raises(BadInput, match="no picture"):
        average_effective_rank(loaded, [])
