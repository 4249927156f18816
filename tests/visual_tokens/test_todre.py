"""ToDRE: growth against a slow double loop, pivot and attention shares against eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import cast, load, picture, visual_places

import zoo
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.todre import ToDRE, attention_share, grow
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model


def inputs(loaded: LoadedModel, *texts: str) -> dict[str, Any]:
    pictures = [picture(number) for number in range(len(texts))]
    return dict(loaded.processor(text=list(texts), images=pictures, return_tensors="pt", padding=True))


def slow(x: torch.Tensor, first: int, count: int, total: Any) -> list[int]:
    chosen = [first]
    while len(chosen) < count:
        costs = {
            v: total([float(torch.cosine_similarity(x[v], x[c], dim=0)) for c in chosen])
            for v in range(len(x))
            if v not in chosen
        }
        chosen.append(min(costs, key=costs.__getitem__))
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("diversity", "total"), [("max_sum", sum), ("k_center", max)])
def test_growth_equals_a_double_loop(diversity: str, total: Any, dtype: torch.dtype) -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    method = ToDRE(keep_tokens=17, diversity=diversity)
    assert method.order(x, 5).tolist() == slow(x.float(), 5, 17, total)


def test_a_diverse_set_beats_the_inverted_one() -> None:
    """Forty near-copies of the pivot and four other directions: the most similar first would miss those four."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(16)
    x = torch.cat((axes[:1].expand(40, -1), axes[1:5])) + 0.01 * torch.randn(44, 16, generator=generator)
    similarity = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(x, dim=-1).T
    for combine in (torch.add, torch.maximum):
        kept = grow(x, 0, 5, combine)
        assert sorted(kept.tolist()) == [0, 40, 41, 42, 43]
        inverted = similarity[0].topk(5).indices
        assert similarity[kept][:, kept].sum() < 0.3 * similarity[inverted][:, inverted].sum()


def test_duplicates_of_an_outlier_fill_a_sum_but_not_a_maximum() -> None:
    """Known of max-sum dispersion: copies of a direction far from the bulk are not excluded."""
    x = torch.tensor([[1.0, 0.0]] * 6 + [[-1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert sorted(grow(x, 0, 3, torch.maximum).tolist()) == [0, 6, 9]
    assert len(set(grow(x, 0, 10, torch.add).tolist())) == 10
    assert len(set(grow(torch.ones(5, 3), 2, 5, torch.add).tolist())) == 5


def test_the_pivot_is_what_cls_looks_at_most() -> None:
    model, processor = tiny_model("tiny-llava", attention="eager")
    loaded = LoadedModel(model, processor, "eager")
    data = inputs(loaded, "<image>\nWhat is it?")
    with torch.no_grad():
        maps = model.model.vision_tower(data["pixel_values"], output_attentions=True).attentions
    expected = int(maps[-1][0, :, 0, 1:].mean(0).argmax())
    sdpa = load("tiny-llava")
    seen: list[int] = []

    class Looking(ToDRE):
        def first(self, view: View, by_cls: bool) -> int:
            assert by_cls
            seen.append(super().first(view, by_cls))
            return seen[-1]

    method = Looking(keep_tokens=5)
    with method.apply(sdpa) as applied, torch.no_grad():
        applied(**data)
        kept = applied.kept[-1][0] - int(visual_places(sdpa, data["input_ids"][0])[0])
    assert seen == [expected]
    assert kept.tolist() == sorted(kept.tolist())
    assert expected in kept.tolist()


@pytest.mark.parametrize("name", ["tiny-llava-next", "tiny-internvl", "tiny-qwen2.5-vl", "tiny-smolvlm"])
def test_only_thumbnails_are_eligible_where_there_are_tiles(name: str) -> None:
    """With and without [CLS]; encoders without it draw the pivot."""
    loaded = load(name)
    picked: list[tuple[bool, bool]] = []

    class Looking(ToDRE):
        def first(self, view: View, by_cls: bool) -> int:
            pivot = super().first(view, by_cls)
            thumbnail = torch.zeros(len(view.tokens), dtype=torch.bool)
            newline = thumbnail.clone()
            for image in view.images:
                thumbnail[image.tokens], newline[image.tokens] = image.thumbnail, image.newline
            picked.append((bool(thumbnail.any()), bool(thumbnail[pivot])))
            assert not newline[pivot]
            return pivot

    data = dict(loaded.processor(text=["<image>?"], images=[picture(1, 96, 50)], return_tensors="pt"))
    for seed in range(5):
        with Looking(keep_ratio=0.3, parts="diversity", seed=seed).apply(loaded) as applied, torch.no_grad():
            applied(**data)
            assert len(applied.kept[-1][0]) == Looking(keep_ratio=0.3).count(
                len(visual_places(loaded, data["input_ids"][0]))
            )
    assert all(chosen for tiled, chosen in picked if tiled)
    assert (name == "tiny-qwen2.5-vl") == (not any(tiled for tiled, _ in picked))


def shares(data: dict[str, Any], layer: int) -> tuple[float, float]:
    """Both ratios from full eager maps of one sample."""
    model, processor = tiny_model("tiny-llava", attention="eager")
    with torch.no_grad():
        attention = model(**data, output_attentions=True).attentions[layer][0].mean(0)
    visual = visual_places(LoadedModel(model, processor, "eager"), data["input_ids"][0])
    text = torch.tensor(
        [p for p in range(len(attention)) if p > int(visual.min()) and p not in visual.tolist()]
    )
    tv = attention[text][:, visual].sum() / attention[text].sum()
    vt = attention[visual][:, text].sum() / attention[visual].sum()
    return float(tv), float(vt)


@pytest.mark.parametrize("prompts", [("<image>\nWhat is it?",), ("Before <image> between <image> after",)])
def test_withdrawal_follows_the_larger_of_both_shares(prompts: tuple[str, ...]) -> None:
    loaded = load("tiny-llava")
    images = [picture(number) for number in range(prompts[0].count("<image>"))]
    data = dict(loaded.processor(text=list(prompts), images=images, return_tensors="pt"))
    tv, vt = shares(data, 2)
    assert (vt > 0) == (len(images) == 2)  # only a later picture sees task text
    largest = max(tv, vt)
    for tau, leaves in ((largest * 0.99, False), (largest * 1.01, True)):
        with zoo.method("todre", parts="withdrawal", tau=tau).apply(loaded) as applied, torch.no_grad():
            cache = applied(**data, use_cache=True).past_key_values
            assert (len(applied.kept[3][0]) == 0) == leaves
        lengths = [layer.get_seq_length() for layer in cache.layers]
        assert len(set(lengths[:3])) == 1
        assert (lengths[3] < lengths[2]) == leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_samples_of_a_batch_decide_by_themselves(dtype: torch.dtype) -> None:
    loaded = load("tiny-llava", dtype)
    texts = (
        "<image>?",
        "Some longer words here <image> and a much longer question, is it on the left of the house?",
    )
    single = [cast(inputs(loaded, text), dtype) for text in texts]
    values: list[float] = []

    class Looking(ToDRE):
        def withdraw(self, view: View) -> Any:
            text = view.text_index[view.text_index > view.index.min()]
            values.append(attention_share(view.received(view.layer - 1, text), view.index))
            return super().withdraw(view)

    with Looking(keep_ratio=0.3).apply(loaded) as applied, torch.no_grad():
        for data in single:
            applied(**data)
    tau = sum(values) / 2
    assert abs(values[0] - values[1]) > 0.05
    together = cast(inputs(loaded, *texts), dtype)
    together["pixel_values"] = torch.cat([data["pixel_values"] for data in single])
    with ToDRE(keep_ratio=0.3, tau=tau).apply(loaded) as applied:
        alone = []
        for data, value in zip(single, values, strict=True):
            ids = applied.generate(**data, max_new_tokens=6, do_sample=False)
            alone.append(ids[0, data["input_ids"].shape[1] :].tolist())
            assert (len(applied.kept[3][0]) == 0) == (value < tau)
        ids = applied.generate(**together, max_new_tokens=6, do_sample=False)
        emptied = [len(kept) == 0 for kept in applied.kept[3]]
    assert emptied == [value < tau for value in values]
    if dtype == torch.float32:
        assert ids[:, together["input_ids"].shape[1] :].tolist() == alone


def test_what_turns_it_off() -> None:
    loaded = load("tiny-llava")
    assert ToDRE(keep_ratio=1).stages(loaded.anatomy) == []
    assert [stage.layer for stage in ToDRE(keep_ratio=1, parts="withdrawal").stages(loaded.anatomy)] == [3]
    data = inputs(loaded, "<image>?")
    with ToDRE(parts="withdrawal", tau=0).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        assert len(applied.kept[3][0]) == len(visual_places(loaded, data["input_ids"][0]))
