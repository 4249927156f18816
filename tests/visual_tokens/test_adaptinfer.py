"""AdaptInfer: scores against loops and against eager attention, budgets of the paper, the offline analysis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import ARCHITECTURES, cast, load, picture, visual_places

import zoo
from zoo.engines.tokens import View
from zoo.errors import BadInput
from zoo.methods.visual_tokens._attention_shift import change_points, peaks, received_per_layer
from zoo.methods.visual_tokens.adaptinfer import AdaptInfer, counts_for, text_guided_scores
from zoo.models import LoadedModel


def causal(heads: int, length: int, seed: int = 0) -> torch.Tensor:
    scores = 2 * torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -float("inf")).softmax(-1)


def slow_scores(attention: torch.Tensor, text: list[int], visual: list[int]) -> torch.Tensor:
    found = torch.zeros(len(visual), dtype=torch.float64)
    for one in attention.double():
        for j in text:
            prior = sum(one[j, i] + (one[i, j] if i != j else 0) for i in text)
            for v, place in enumerate(visual):
                found[v] += prior * one[j, place]
    return found.float()


@pytest.mark.parametrize(("prefix", "number", "text"), [(3, 30, 5), (0, 6, 40), (2, 4, 1), (1, 3, 9)])
def test_scores_equal_the_definition_however_many_rows_come_at_once(
    prefix: int, number: int, text: int
) -> None:
    attention = causal(3, prefix + number + text)
    visual, rows = (
        torch.arange(prefix, prefix + number),
        torch.arange(prefix + number, prefix + number + text),
    )
    widest = 0

    def some(places: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, len(places))
        return attention[:, places]

    found = text_guided_scores(some, rows, visual)
    torch.testing.assert_close(found, slow_scores(attention, rows.tolist(), visual.tolist()))
    assert widest <= max(1, (number + text) // 4)


def prompt(loaded: LoadedModel) -> dict[str, Any]:
    texts = ["<image>\nWhat is it?", "Now <image>, and what is this?", "A <image> b"]
    images = [picture(0), picture(1, 60, 90), picture(2, 48, 48)]
    return dict(loaded.processor(text=texts, images=images, return_tensors="pt", padding=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_first_cut_follows_eager_attention(name: str) -> None:
    loaded = load(name)
    data = prompt(loaded)
    with torch.no_grad(), AdaptInfer(layers=(1,), counts=(7,)).apply(loaded) as applied:
        applied(**data)
        kept = [rows.tolist() for rows in applied.kept[2]]
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = loaded.model(**data, output_attentions=True).attentions[1]
    for sample, rows in enumerate(kept):
        visual = visual_places(loaded, data["input_ids"][sample])
        text = list(range(int(visual[-1]) + 1, data["input_ids"].shape[1]))
        scores = slow_scores(attention[sample], text, visual.tolist())
        assert rows == visual[scores.topk(min(7, len(visual) - 1)).indices].sort().values.tolist()


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next", "tiny-qwen3-vl"])
def test_bf16_and_three_cuts(name: str) -> None:
    loaded = load(name, torch.bfloat16)
    data = cast(prompt(loaded), torch.bfloat16)
    with AdaptInfer(layers=(0, 1, 2), ratios=(0.5, 0.6, 0.3)).apply(loaded) as applied:
        applied.generate(**data, max_new_tokens=3, do_sample=False)
        for sample, ids in enumerate(data["input_ids"]):
            left = len(visual_places(loaded, ids))
            for layer, ratio in zip((1, 2, 3), (0.5, 0.6, 0.3), strict=True):
                kept = applied.kept[layer][sample]
                left = max(1, int(left * ratio))
                assert len(kept) == left
                assert torch.equal(kept, kept.sort().values)


def test_tokens_that_the_guiding_row_attends_to_stay() -> None:
    """Row A is attended to by the text behind it, row B by nobody: A's tokens stay, not B's, not those of neither."""
    visual, text = torch.arange(8), torch.arange(8, 12)
    attention = torch.zeros(1, 12, 12)
    attention[0, 8, [1, 5]] = 0.3  # A
    attention[0, 8, 8] = 0.4
    attention[0, 9, [2, 6]] = 0.4  # B looks at other tokens, even more
    attention[0, 9, 9] = 0.2
    attention[0, 10:, 8] = 1.0
    view = View(
        torch.zeros(8, 1),
        visual,
        visual,
        torch.zeros(4, 1),
        text,
        8,
        1,
        _seen={0: type("Rows", (), {"rows": lambda self, sample, index: attention[:, index]})()},
    )
    kept = AdaptInfer(layers=(0,), counts=(2,)).select(0, view)
    assert kept.index.tolist() == [[1, 5]]


@pytest.mark.parametrize(("budget", "counts"), [(128, (290, 72, 18)), (64, (133, 27, 3)), (32, (40, 12, 0))])
def test_the_papers_budgets(budget: int, counts: tuple[int, ...]) -> None:
    for method in (AdaptInfer(keep_tokens=budget), AdaptInfer(keep_ratio=budget / 576)):
        assert tuple(method.left(number, 576, 576) for number in range(3)) == counts
    assert AdaptInfer(keep_tokens=budget).left(0, 576, 30) <= 29


def test_budgets_in_between_grow_with_the_budget() -> None:
    rows = torch.tensor([counts_for(budget) for budget in range(1, 577)])
    assert bool((rows[1:] >= rows[:-1]).all())
    assert rows[-1].tolist() == [576] * 3
    assert rows[0].tolist() == [0] * 3
    assert AdaptInfer(keep_ratio=128 / 576).left(0, 1152, 1152) == 580


def test_wrong_schedules_are_refused() -> None:
    for wrong in (
        {"counts": (3, 2)},
        {"ratios": (0.5,), "counts": (1,)},
        {"layers": (3, 1), "counts": (2, 1)},
    ):
        with pytest.raises(ValueError, match=r"layers|not both"):
            AdaptInfer(**wrong)


def test_change_points_minimise_the_squared_deviations() -> None:
    curves = torch.rand(40, 9, generator=torch.Generator().manual_seed(0)).cumsum(1)
    for curve, found in zip(curves.double(), change_points(curves).tolist(), strict=True):
        costs = [
            float(sum(((part - part.mean()) ** 2).sum() for part in (curve[:b], curve[b:])))
            for b in range(1, 9)
        ]
        assert found == costs.index(min(costs))
    steps = torch.zeros(3, 12)
    for row, layer in enumerate((0, 4, 10)):
        steps[row, layer + 1 :] = 1.0
    assert change_points(steps).tolist() == [0, 4, 10]


def test_peaks_are_frequent_and_apart() -> None:
    points = torch.tensor([1] * 9 + [2] * 8 + [10] * 5 + [20] * 4 + [30])
    assert peaks(points, 3, 32) == (1, 10, 20)
    with pytest.raises(BadInput, match="more samples"):
        peaks(torch.tensor([1, 1, 2]), 3, 32)


def test_the_search_reads_every_layer_and_leaves_nothing_behind() -> None:
    loaded = load("tiny-llava")
    samples = [
        dict(loaded.processor(text="<image>\nWhat is it?", images=[picture(seed)], return_tensors="pt"))
        for seed in range(3)
    ]
    found = received_per_layer(loaded, samples[0])
    method = AdaptInfer.fit(loaded, samples, counts=(5,))
    assert method.layers is not None
    assert 0 <= method.layers[0] <= 2
    assert method.counts == (5,)
    with pytest.raises(BadInput, match="without padding"):
        AdaptInfer.fit(loaded, [prompt(loaded)])
    assert loaded.model.config.text_config._attn_implementation == "sdpa"
    loaded.model.set_attn_implementation("eager")
    visual = visual_places(loaded, samples[0]["input_ids"][0])
    with torch.no_grad():
        attentions = loaded.model(**samples[0], output_attentions=True).attentions
    expected = torch.stack([a[0, :, int(visual[-1]) + 1 :, visual].mean((0, 1)) for a in attentions])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_behind_another_method_the_budget_is_of_what_is_left() -> None:
    loaded = load("tiny-llava")
    spec = {"divprune.keep_tokens": 20, "adaptinfer.keep_ratio": 64 / 576, "adaptinfer.layers": (0, 1, 2)}
    with zoo.method("divprune+adaptinfer", **spec).apply(loaded) as applied, torch.no_grad():
        applied(**prompt(loaded))
        lengths = [bar.kept for bar in applied.layers[0].report.bars["visual tokens"]]
    assert lengths == [20, round(133 * 20 / 576), round(27 * 20 / 576), round(3 * 20 / 576)]
