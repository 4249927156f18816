"""CATP: against a slow greedy selection, and both inner stages by hand on eager attention maps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import floor
from typing import Any

import pytest
import torch
from reference import NEW, cast, decoder_call, load, picture
from transformers import DynamicCache

import zoo
from zoo.methods.visual_tokens.catp import CATP
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

PROMPTS = (
    "Name it. <image> a red house <image> two birds <image>\nWhat is it?",
    "<image> yes <image> no <image> And this one, on the left?",
    "Say: <image> one <image> and a longer text <image>?",
)
SETTINGS = {"layer": 1, "keep_ratio": 0.4}


def inputs(loaded: LoadedModel, *samples: int) -> dict[str, Any]:
    texts = [PROMPTS[sample] for sample in samples]
    pictures = [picture(sample * 10 + number) for sample in samples for number in range(3)]
    return dict(loaded.processor(text=texts, images=pictures, return_tensors="pt", padding=True))


def coverage(x: torch.Tensor, text: torch.Tensor, weight: float) -> Callable[[list[int]], float]:
    """The objective of stage 1 as the paper writes it."""
    x, v = x.double(), text.double().mean(0)
    near = (torch.cosine_similarity(x[:, None], x[None], dim=-1) + 1) / 2
    like = (torch.cosine_similarity(x, v[None], dim=-1) + 1) / 2
    return lambda chosen: float(near[:, chosen].max(1).values.sum() + weight * like[chosen].sum())


def slow_cover(x: torch.Tensor, text: torch.Tensor, count: int, weight: float) -> list[int]:
    """Greedy picks, every candidate evaluated anew."""
    value = coverage(x, text, weight)
    picked: list[int] = []
    for _ in range(count):
        left = [number for number in range(len(x)) if number not in picked]
        picked.append(max(left, key=lambda number: value([*picked, number])))
    return picked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weight", [0.0, 0.7, 5.0])
def test_covering_equals_the_objective(weight: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(n, 10, generator=generator).to(dtype) for n in (40, 5))
    method = CATP(text_weight=weight)
    picked = method.covering(x, text, 25).tolist()
    if weight:
        assert picked == slow_cover(x, text, 25, weight)
    # Two tokens that cover but each other tie exactly, so coverage alone is compared by what it reaches.
    value = coverage(x, text, weight)
    for step in range(25):
        best = max(value([*picked[:step], number]) for number in range(40) if number not in picked[:step])
        assert value(picked[: step + 1]) == pytest.approx(best, abs=1e-5)


def test_covering_takes_every_kind_of_token_and_inverted_scores_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.eye(8)[:4].repeat_interleave(torch.tensor([20, 10, 5, 3]), dim=0)
    x = kinds + 0.01 * torch.randn(38, 8, generator=generator)
    picked = CATP().covering(x, torch.zeros(0, 8), 4)
    assert set(kinds[picked].argmax(1).tolist()) == {0, 1, 2, 3}
    last = CATP().covering(x, torch.zeros(0, 8), 38)[-4:]
    assert set(kinds[last].argmax(1).tolist()) != {0, 1, 2, 3}


def test_context_that_resembles_the_query_stays() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(16, generator=generator)
    x = torch.randn(30, 16, generator=generator)
    x[[4, 9, 22]] = query + 0.1 * torch.randn(3, 16, generator=generator)
    growth = torch.full((30,), -1.0)
    growth[13] = 0.004
    method = CATP()
    assert set(method.context_scores(growth, x, query).topk(3).indices.tolist()) == {4, 9, 22}
    assert not {4, 9, 22} & set((-method.context_scores(growth, x, query)).topk(3).indices.tolist())
    # A fall of attention counts as none; growth is tiny beside cosines until it is normalised.
    plain = 0.6 * torch.cosine_similarity(x, query[None], dim=1)
    expected = plain + torch.nn.functional.one_hot(torch.tensor(13), 30) * 0.004
    torch.testing.assert_close(method.context_scores(growth, x, query), expected)
    assert int(CATP(normalise=True).context_scores(growth, x, query).argmax()) in {4, 9, 13, 22}
    assert float(CATP(normalise=True).context_scores(growth, x, query)[13]) == pytest.approx(
        1 + float(plain[13])
    )


@torch.no_grad()
def by_hand(name: str, data: dict[str, Any], dtype: torch.dtype, ratio: float, layer: int) -> list[list[int]]:
    """Original places kept by each stage for one sample, from full eager maps of the unhooked model."""
    model, processor = tiny_model(name, attention="eager")
    loaded = LoadedModel(model.to(dtype), processor, "eager")
    inner = loaded.model.model.language_model
    hidden = decoder_call(loaded, data)["inputs_embeds"]
    ids = data["input_ids"][0]
    visual = (ids == loaded.model.config.image_token_id).nonzero().squeeze(-1)
    breaks = (visual.diff() != 1).nonzero().squeeze(-1) + 1
    pictures = [part.tolist() for part in visual.tensor_split(breaks)]
    text = [place for place in range(len(ids)) if place not in visual.tolist()]
    starts = [*(picture[0] for picture in pictures), len(ids)]
    kept: list[list[int]] = []
    for number, own in enumerate(pictures):
        paired = [place for place in text if starts[number] < place < starts[number + 1]]
        count = floor(len(own) * (1 - (1 - ratio) / 2))
        kept.append(sorted(own[i] for i in slow_cover(hidden[0, own], hidden[0, paired], count, 0.7)))
    stages = [sorted(chain.from_iterable(kept))]
    order = sorted([*text, *stages[0]])
    hidden = hidden[:, order]
    maps = []

    def run(number: int) -> None:
        nonlocal hidden
        positions = torch.tensor([order])
        rotary = inner.rotary_emb(hidden, position_ids=positions)
        size = len(order)
        mask = torch.full((size, size), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
        block = inner.layers[number]
        maps.append(block.self_attn(block.input_layernorm(hidden), rotary, mask)[1])
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)

    for number in range(layer + 1):
        run(number)
    demonstrations = kept[0] + kept[1]
    asked = hidden[0, [order.index(p) for p in order if p >= starts[2]]].float().mean(0)
    score = {}
    for place in demonstrations:
        at = order.index(place)
        growth = float(
            maps[layer][0, :, -1, at].float().mean() - maps[layer - 1][0, :, -1, at].float().mean()
        )
        score[place] = max(0.0, growth) + 0.6 * float(
            torch.cosine_similarity(hidden[0, at].float(), asked, dim=0)
        )
    count = floor(ratio * (len(pictures[0]) + len(pictures[1])))
    stay = sorted(demonstrations, key=score.__getitem__)[-count:]
    stages.append(sorted([*stay, *kept[2]]))
    fresh = sorted([*text, *stages[1]])
    hidden = hidden[:, [order.index(place) for place in fresh]]
    order = fresh
    run(layer + 1)
    context = [place for place in order if starts[0] <= place < starts[2]]
    mean = hidden[0, [order.index(place) for place in context]].float().mean(0)
    like = {
        place: float(torch.cosine_similarity(hidden[0, order.index(place)].float(), mean, dim=0))
        for place in kept[2]
    }
    best = sorted(kept[2], key=like.__getitem__)[-floor(ratio * len(pictures[2])) :]
    stages.append(sorted([*stay, *best]))
    return stages


@pytest.mark.parametrize("sample", range(3))
def test_all_stages_equal_the_paper_by_hand(sample: int) -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, sample)
    expected = by_hand("tiny-llava", data, torch.float32, 0.4, 1)
    with zoo.method("catp", **SETTINGS).apply(loaded) as applied, torch.no_grad():
        cache = applied(**data, use_cache=True).past_key_values
        assert [applied.kept[layer][0].tolist() for layer in (-1, 2, 3)] == expected
    text = int((data["input_ids"] != loaded.model.config.image_token_id).sum())
    assert [entry.get_seq_length() - text for entry in cache.layers] == [
        len(expected[0]),
        len(expected[0]),
        len(expected[1]),
        len(expected[2]),
    ]
    assert len(expected[2]) == floor(0.4 * 72) + floor(0.4 * 36)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl", "tiny-internvl", "tiny-smolvlm"])
def test_a_padded_batch_equals_single_samples(name: str) -> None:
    loaded = load(name)
    together = inputs(loaded, 0, 1, 2)
    assert bool((together["attention_mask"] == 0).any())
    with zoo.method("catp", **SETTINGS).apply(loaded) as applied:
        ids = applied.generate(**together, max_new_tokens=NEW, do_sample=False)
        for sample in range(3):
            data = inputs(loaded, sample)
            alone = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            assert (
                alone[0, data["input_ids"].shape[1] :].tolist()
                == ids[sample, together["input_ids"].shape[1] :].tolist()
            )


def test_half_precision_meets_the_budget() -> None:
    loaded = load("tiny-llava-onevision", torch.bfloat16)
    data = cast(inputs(loaded, 0, 2), torch.bfloat16)
    with zoo.method("catp", **SETTINGS).apply(loaded) as applied, torch.no_grad():
        cache = applied(
            **data, past_key_values=DynamicCache(config=loaded.model.config.text_config)
        ).past_key_values
        for sample, whole in enumerate(
            (data["input_ids"] == loaded.model.config.image_token_id).sum(1).tolist()
        ):
            each = whole // 3
            counts = [len(applied.kept[layer][sample]) for layer in (-1, 2, 3)]
            demonstrations = floor(0.4 * 2 * each)
            assert counts == [
                3 * floor(0.7 * each),
                demonstrations + floor(0.7 * each),
                demonstrations + floor(0.4 * each),
            ]
    assert cache.get_seq_length(3) < cache.get_seq_length(2) < cache.get_seq_length(1)


def test_a_query_alone_is_pruned_by_its_question() -> None:
    loaded = load("tiny-llava")
    kept = []
    for question in ("What is it?", "Is it on the left of the house, or elsewhere?"):
        data = dict(loaded.processor(text=[f"<image>{question}"], images=[picture(0)], return_tensors="pt"))
        with zoo.method("catp", **SETTINGS).apply(loaded) as applied, torch.no_grad():
            applied(**data)
            counts = [len(applied.kept[layer][0]) for layer in (-1, 2, 3)]
            kept.append(applied.kept[3][0].tolist())
        assert counts == [floor(0.7 * 36), floor(0.7 * 36), floor(0.4 * 36)]
    assert kept[0] != kept[1]
    data = dict(loaded.processor(text=["<image>"], images=[picture(0)], return_tensors="pt"))
    with zoo.method("catp", **SETTINGS).apply(loaded) as applied, torch.no_grad():
        applied(**data)


def test_keeping_all_has_no_stage() -> None:
    assert CATP(keep_ratio=1).stages(load("tiny-llava").anatomy) == []
