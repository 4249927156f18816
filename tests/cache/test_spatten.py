"""SpAtten: cascades against masks on the full model, cache entries step by step, values and bits by hand, chats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import DynamicCache

import zoo
from zoo.bench.flops import count_flops
from zoo.engines.cascade import Cascade, kept_count, strongest
from zoo.errors import BadInput, BadParameter, Refused
from zoo.families.text_tokens import text_body
from zoo.methods.cache._spatten_attention import SparseAttention, keep_largest, quantise
from zoo.methods.cache.spatten import SpAtten, cache_entries, course
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

TEXTS = ["a cat sat on the mat and slept", "two frogs", "the quick brown fox jumps"]
DEPTH = 4


def load(name: str, **changes: Any) -> LoadedModel:
    model, processor = tiny_model(name, **changes)
    if name == "tiny-gpt2":
        model.generation_config.eos_token_id = None
    return LoadedModel(model, processor, name)


def inputs_of(loaded: LoadedModel, count: int = 3) -> dict[str, torch.Tensor]:
    return dict(loaded.processor(TEXTS[:count], return_tensors="pt", padding=True))


def output_of(output: Any) -> torch.Tensor:
    found = output.logits if "logits" in output else output.last_hidden_state
    assert isinstance(found, torch.Tensor)
    return found


def footprint(model: Any) -> dict[str, Any]:
    left: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            left[f"{name}.{key}"] = tuple(value) if isinstance(value, dict) else id(value)
    return left


def by_hand(
    loaded: LoadedModel, ids: torch.Tensor, keep_tokens: list[float], keep_heads: list[float]
) -> tuple[torch.Tensor, list[list[int]], list[list[int]]]:
    """One text through the *whole* model: what has left is masked, and keeps the state with which it left.

    Returns the output, and the tokens and heads of each layer.
    """
    body, causal = text_body(loaded), loaded.anatomy.decoder is not None
    length, heads = ids.shape[1], body.layers[0].attention.heads
    tokens, working = list(range(length)), list(range(heads))
    importance, magnitude = torch.zeros(length), torch.zeros(heads)
    seen: tuple[list[list[int]], list[list[int]]] = ([], [])
    embedded = body.module.wte(ids) + body.module.wpe(torch.arange(length)) if causal else None
    x = body.module.embeddings(ids) if embedded is None else embedded
    for index, layer in enumerate(body.layers):
        if index:
            count = math.floor(len(tokens) * keep_tokens[index] + 1e-6)
            guarded = tokens[-1] if causal else tokens[0]
            order = sorted(tokens, key=lambda token: (token != guarded, -importance[token].item()))
            tokens = sorted(order[:count])
            count = math.floor(len(working) * keep_heads[index] + 1e-6)
            working = sorted(sorted(working, key=lambda head: -magnitude[head].item())[:count])
        seen[0].append(tokens)
        seen[1].append(working)
        read = layer.input_norm(x) if causal else x
        parts = (layer.attention.query, layer.attention.key, layer.attention.value)
        query, key, value = (part(read).view(length, heads, -1).transpose(0, 1) for part in parts)
        hidden = torch.ones(length, length, dtype=torch.bool)
        hidden[:, tokens] = False
        if causal:
            hidden |= torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(-1, -2) * layer.attention.scaling).masked_fill(hidden, -1e30)
        attention = scores.softmax(-1)
        put_out = attention @ value
        for head in range(heads):
            if head not in working:
                put_out[head] = 0
                attention[head] = 0
        importance += attention[:, tokens].sum((0, 1))
        magnitude += put_out[:, tokens].abs().sum((1, 2))
        merged = layer.attention.output(put_out.transpose(0, 1).flatten(1))
        if causal:
            y = x + merged
            y = y + layer.mlp.module(layer.post_norm(y))
        else:
            y = layer.input_norm(x + merged)
            y = layer.module.feed_forward_chunk(y)
        x = x.clone()
        x[0, tokens] = y[0, tokens]
    return loaded.model.lm_head(body.norm(x)) if causal else x, *seen


# --- the cascade -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
def test_what_leaves_equals_what_is_masked(name: str) -> None:
    loaded = load(name)
    ids = inputs_of(loaded, 1)["input_ids"]
    method = SpAtten(keep_tokens=(0.8, 0.6), keep_heads=(0.75, 0.7), spared_heads=0)
    tokens, heads = course(DEPTH, 0.15, (0.8, 0.6)), course(DEPTH, 0, (0.75, 0.7))
    expected, left, working = by_hand(loaded, ids, tokens, heads)
    with method.apply(loaded) as applied:
        found = output_of(applied(input_ids=ids))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    report = applied.report
    assert [bar.kept for bar in report.bars["tokens"]] == [len(row) for row in left]
    assert [bar.kept for bar in report.bars["heads"]] == [len(row) for row in working] == [4, 3, 2, 1]
    assert report.total == ids.shape[1] > report.kept


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cascade_that_drops_nothing_is_the_model(name: str, dtype: torch.dtype) -> None:
    loaded = load(name)
    loaded.model.to(dtype)
    inputs = inputs_of(loaded)
    dense = output_of(loaded.model(**inputs))
    cascade = Cascade(text_body(loaded), [1.0] * DEPTH, [1.0] * DEPTH, SparseAttention(), "a cascade")
    found = output_of(loaded.model(**inputs))
    there = inputs["attention_mask"].bool()
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert_close(found[there], dense[there], rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype
    if name == "tiny-gpt2" and dtype == torch.float32:
        written = loaded.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        cascade.close()
        assert torch.equal(written, loaded.model.generate(**inputs, max_new_tokens=10, do_sample=False))
    cascade.close()


@torch.no_grad()
def test_cache_entries_nest_and_follow_the_counts_at_every_step() -> None:
    loaded = load("tiny-gpt2")
    inputs = inputs_of(loaded)
    keep, heads = [1.0, 0.9, 0.8, 0.7], [1.0, 1.0, 0.5, 0.5]
    cascade = Cascade(text_body(loaded), keep, heads, SparseAttention(), "a cascade")
    cache = DynamicCache(config=loaded.model.config)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    gone: list[set[int]] = [set() for _ in TEXTS]
    for step in range(6):
        logits = loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
        total = mask.sum(1).tolist()
        entries = cascade.entries
        for sample, count in enumerate(total):
            rows = [entries[layer][sample] for layer in range(DEPTH)]
            for layer in range(DEPTH):
                assert len(rows[layer]) == count
                assert rows[layer] == sorted(rows[layer])
                assert rows[layer][-1] == mask.shape[1] - 1  # the current token
                if layer:
                    assert set(rows[layer]) <= set(rows[layer - 1])
                if layer + 1 < DEPTH:
                    count = max(1, math.floor(count * keep[layer + 1] + 1e-6))
            assert not gone[sample] & set(rows[-1])
            gone[sample] = set(rows[0]) - set(rows[-1])
        assert [held.keys.shape[1] for held in cache.layers] == cascade.heads == [4, 4, 2, 1]
        longest = [max(len(row) for row in layer) for layer in entries[1:]]
        assert [held.get_seq_length() for held in cache.layers[1:]] == longest
        assert cache.get_seq_length() == mask.shape[1]
        ids = logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, mask.new_ones(3, 1)), 1)
        assert step < 6
    cascade.close()


@torch.no_grad()
def test_importance_is_added_up_over_layers_and_steps() -> None:
    loaded = load("tiny-gpt2")
    ids = inputs_of(loaded, 1)["input_ids"]
    cascade = Cascade(text_body(loaded), [1.0] * DEPTH, [1.0] * DEPTH, SparseAttention(), "a cascade")
    cache = DynamicCache(config=loaded.model.config)
    loaded.model(input_ids=ids[:, :-1], past_key_values=cache)
    # Every query hands out a probability of one, in each head of each layer.
    assert float(cascade.importance.sum()) == pytest.approx((ids.shape[1] - 1) * DEPTH * 4, rel=1e-4)
    loaded.model(input_ids=ids[:, -1:], past_key_values=cache)
    stepwise = cascade.importance
    loaded.model(input_ids=ids)
    assert_close(cascade.importance, stepwise, rtol=1e-4, atol=1e-4)
    cascade.close()


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
def test_few_heads_at_a_time_give_what_all_at_once_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(name)
    batch, length = inputs_of(loaded)["input_ids"].shape
    found, importance = [], []
    for numbers in (1, 2 * batch * length**2, 2**40):  # one head, two heads, all heads
        monkeypatch.setattr("zoo.engines.cascade._MAPS", numbers)
        cascade = Cascade(
            text_body(loaded), [1, 0.8, 0.8, 0.8], [1.0] * DEPTH, SparseAttention(), "a cascade"
        )
        found.append(output_of(loaded.model(**inputs_of(loaded))))
        importance.append(cascade.importance)
        cascade.close()
    for other in (1, 2):
        assert_close(found[0], found[other], rtol=1e-5, atol=1e-5)
        assert_close(importance[0], importance[other], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_heads_that_leave_are_not_computed() -> None:
    loaded = load("tiny-gpt2")
    ids = inputs_of(loaded, 1)["input_ids"]
    flops = []
    for keep in (1 - 1e-9, 0.5):
        with SpAtten(keep_tokens=(1, 1), keep_heads=(keep, keep), spared_heads=0).apply(loaded):
            flops.append(count_flops(lambda: loaded.model(input_ids=ids)))
    tokens, width, length = ids.shape[1], 64, ids.shape[1]
    saved_heads = 2 + 3 + 3  # of 4 in layers 1, 2, 3
    per_head = 2 * tokens * 4 * width * (width // 4) + 4 * tokens * length * (width // 4)
    per_head += 2 * tokens * (length + width // 4)  # adding up what it attends to and puts out
    assert flops[0] - flops[1] == saved_heads * per_head


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
def test_nothing_stays_behind(name: str) -> None:
    loaded = load(name)
    inputs = inputs_of(loaded)
    before, dense = footprint(loaded.model), output_of(loaded.model(**inputs))
    with SpAtten().apply(loaded) as applied:
        first = output_of(applied(**inputs))
        with pytest.raises(IndexError):
            applied(input_ids=torch.tensor([[10**6]]))
        applied(**inputs_of(loaded, 2))
        assert torch.equal(output_of(applied(**inputs)), first)
    assert not torch.equal(first, dense)
    assert footprint(loaded.model) == before
    assert torch.equal(output_of(loaded.model(**inputs)), dense)
    with SpAtten(keep_tokens=(1, 1), keep_heads=(1, 1)).apply(loaded) as applied:
        assert torch.equal(output_of(applied(**inputs)), dense)
        assert applied.report.kept_ratio == 1


# --- choosing --------------------------------------------------------------------------------------------------


def test_the_course_spares_the_front() -> None:
    assert course(4, 0.15, (0.9, 0.7)) == pytest.approx([1, 0.9, 0.8, 0.7])
    assert course(12, 0.3, (1.0, 0.8))[:5] == pytest.approx([1, 1, 1, 1, 1])
    assert course(12, 0.3, (1.0, 0.8))[-1] == pytest.approx(0.8)
    assert course(1, 0.15, (0.5, 0.5)) == [1.0]


def test_counts_round_down_and_equals_go_to_the_earlier() -> None:
    assert kept_count(torch.tensor([100, 10, 1, 0]), 0.29).tolist() == [29, 2, 1, 0]
    scores = torch.tensor([[1.0, 3.0, 3.0, 9.0, 3.0], [5.0, 1.0, 2.0, 0.0, 7.0]])
    candidates = torch.tensor([[True, True, True, False, True], [True] * 5])
    kept, real = strongest(scores, candidates, torch.tensor([2, 3]), padding_first=True)
    assert kept[0, 1:].tolist() == [1, 2]
    assert kept[1].tolist() == [0, 2, 4]
    assert real.tolist() == [[False, True, True], [True, True, True]]
    _, real = strongest(scores, candidates, torch.tensor([2, 3]), padding_first=False)
    assert real[0].tolist() == [True, True, False]


# --- values and bits -------------------------------------------------------------------------------------------


def test_each_query_reads_its_most_probable_values() -> None:
    rows = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.9, 0.1, 0.0, 0.0]])[None, None]
    allowed = torch.tensor([[True] * 4, [True, True, False, False]])[None, None]
    kept = keep_largest(rows, allowed, 0.75)[0, 0]
    assert_close(kept, torch.tensor([[0.5, 0.1, 0.3, 0.0], [0.9, 0.0, 0.0, 0.0]]))


def test_quantisation_rounds_to_the_grid_and_drops_low_bits() -> None:
    x = torch.tensor([[7.0, -3.4, 0.6, -7.0]])
    assert quantise(x, 4)[0].tolist() == pytest.approx([7, -3, 1, -7])
    # Two bits less: 7 = 0111 -> 0100, -3 = 1101 -> 1100, 1 -> 0, -7 = 1001 -> 1000.
    assert_close(quantise(x, 4, dropped=2), torch.tensor([[4.0, -4.0, 0.0, -8.0]]))
    noise = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    step = noise.abs().amax(-1, keepdim=True) / 127
    assert ((quantise(noise, 8) - noise).abs() <= step / 2 + 1e-6).all()
    assert quantise(torch.zeros(1, 4), 8).tolist() == [[0.0] * 4]


def test_low_bits_are_read_where_attention_is_flat() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, 12, 8, generator=generator)
    query = torch.stack((key[0, 0, 5] * 8, torch.zeros(8)))[None, :, None]  # head 0 is sharp, head 1 flat
    query[0, 1, 0, 0] = 1e-3
    allowed = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    coarse = SparseAttention(bits=(4, 8), tau=0.0)(query, key, value, allowed, 1.0)[1]
    exact = SparseAttention(bits=(4, 8), tau=1.1)(query, key, value, allowed, 1.0)[1]
    attention = SparseAttention(bits=(4, 8), tau=0.5)
    mixed = attention(query, key, value, allowed, 1.0)[1]
    assert (attention.queries, attention.refined) == (2, 1)
    assert torch.equal(mixed[0, 0], coarse[0, 0])
    assert torch.equal(mixed[0, 1], exact[0, 1])
    assert not torch.equal(exact, coarse)
    plain = SparseAttention()(query, key, value, allowed, 1.0)
    assert_close(exact, plain[1], rtol=0.05, atol=0.02)
    several = query.expand(-1, -1, 3, -1)
    assert torch.equal(
        SparseAttention(bits=(4, 8))(several, key, value, allowed, 1.0)[0],
        SparseAttention()(several, key, value, allowed, 1.0)[0],
    )
    still = SparseAttention(bits=(2, 1), progressive=False)(several, key, value, allowed, 1.0)[0]
    assert not torch.equal(still, SparseAttention()(several, key, value, allowed, 1.0)[0])


@torch.no_grad()
def test_values_and_bits_work_in_a_model() -> None:
    loaded = load("tiny-gpt2")
    method = SpAtten(keep_tokens=(1, 1), keep_heads=(1, 1), keep_values=0.9, bits=(8, 4), tau=0.1)
    with method.apply(loaded) as applied:
        applied.generate(**inputs_of(loaded), max_new_tokens=5, do_sample=False)
        assert 0 < float(applied.report.facts["queries that needed the low bits"]) < 1
    bert = load("tiny-bert")
    dense = bert.model(**inputs_of(bert)).last_hidden_state[:, 0]
    with SpAtten(keep_tokens=(1, 1), keep_heads=(1, 1), bits=(8, 4)).apply(bert) as applied:
        close = applied(**inputs_of(bert)).last_hidden_state[:, 0]
    assert F.cosine_similarity(close, dense).min() > 0.999
    assert not torch.equal(close, dense)


# --- the kv mode -----------------------------------------------------------------------------------------------


def test_room_is_taken_out_of_the_recent_part() -> None:
    scores = torch.tensor([[9.0, 0.0, 5.0, 1.0, 4.0, 3.0, 8.0, 8.0, 8.0, 8.0]])
    kept = cache_entries(scores, 1, 2, 4, coming=1)
    assert kept is not None
    assert kept.tolist() == [[0, 2, 6, 7, 8, 9]]
    assert cache_entries(scores, 2, 4, 6, coming=2) is None
    emptied = cache_entries(scores, 1, 2, 4, coming=9)
    assert emptied is not None
    assert emptied.shape == (1, 3)


@torch.no_grad()
def test_a_chat_goes_on_with_what_each_head_asked_for() -> None:
    loaded = load("tiny-gpt2")
    model, turns = loaded.model, [inputs_of(loaded, 1)["input_ids"], *torch.randint(4, 250, (2, 1, 9))]
    method = SpAtten(mode="kv", start=2, important=6, recent=18, reserve=5)
    cache, conversation = DynamicCache(config=model.config), turns[0][:, :0]
    with method.apply(loaded) as applied:
        for turn in turns:
            conversation = torch.cat((conversation, turn), 1)
            read = applied.eviction.read_into(cache)
            before = [
                (held.keys.clone(), held.values.clone()) for held in cache.layers if held.get_seq_length()
            ]
            logits = dict(applied.eviction._logits)
            conversation = applied.generate(
                input_ids=conversation, past_key_values=cache, max_new_tokens=5, do_sample=False
            )
            report = applied.report
            assert report.total == conversation.shape[1] - 1
            if not before:
                continue
            # The same by hand: cut the cache, close up the positions, write on.
            fresh, own = conversation[:, read:-5], DynamicCache(config=model.config)
            for index, (keys, values) in enumerate(before):
                kept = method.entries(logits[index], fresh.shape[1] + 5)
                assert kept is not None
                rows = kept[None, :, :, None].expand(-1, -1, -1, keys.shape[-1])
                own.update(keys.gather(2, rows), values.gather(2, rows), index)
            kept_length = own.get_seq_length()
            assert kept_length == 2 + 6 + max(0, 18 - fresh.shape[1] - 5)
            written, ids = [], fresh
            for _ in range(5):
                start = own.get_seq_length()
                allowed = (
                    torch.arange(start + ids.shape[1]) <= torch.arange(start, start + ids.shape[1])[:, None]
                )
                with plain_model(applied):
                    ids = model(
                        input_ids=ids, past_key_values=own, attention_mask=allowed[None, None],
                        position_ids=torch.arange(start, start + ids.shape[1])[None],
                    ).logits[:, -1:].argmax(-1)  # fmt: skip
                written.append(int(ids))
            assert written == conversation[0, -5:].tolist()
            assert [held.get_seq_length() for held in cache.layers] == [
                bar.kept for bar in report.bars["cache entries"]
            ]
            assert report.kept < report.total


@contextmanager
def plain_model(applied: Any) -> Iterator[None]:
    """The model as it is, while an eviction is at work on it."""
    body, eviction = applied.model.transformer, applied.eviction
    hooks, logits = dict(body._forward_pre_hooks), dict(eviction._logits)
    body._forward_pre_hooks.clear()
    try:
        yield
    finally:
        body._forward_pre_hooks.update(hooks)
        eviction._logits.update(logits)


# --- refusals --------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    for name, has in (
        ("tiny-llama", "rotary positions"),
        ("tiny-vit", "vision encoder"),
        ("tiny-llava", "vision-language"),
    ):
        with pytest.raises(Refused, match=f"spatten needs a BERT- or GPT-2-like text model.*{has}"):
            SpAtten().check(load(name))
    with pytest.raises(Refused, match="kv mode"):
        SpAtten(mode="kv").check(load("tiny-bert"))
    with pytest.raises(BadParameter, match="bits"):
        zoo.method("spatten", bits=[12, 8])
    loaded = load("tiny-gpt2")
    inputs = inputs_of(loaded)
    with SpAtten().apply(loaded) as applied:
        with pytest.raises(Refused, match="beam search"):
            applied.generate(**inputs, num_beams=2)
        with pytest.raises(Refused, match="cache_implementation"):
            applied.generate(**inputs, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(Refused, match="drafter"):
            applied.generate(**inputs_of(loaded, 1), prompt_lookup_num_tokens=3, max_new_tokens=30)
        cache = DynamicCache(config=loaded.model.config)
    loaded.model(**inputs, past_key_values=cache)
    with SpAtten().apply(loaded) as applied, pytest.raises(Refused, match="whole prompt"):
        loaded.model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    with SpAtten(mode="kv").apply(loaded) as applied, pytest.raises(BadInput, match="one conversation"):
        applied.generate(**inputs, max_new_tokens=2)
    bert = load("tiny-bert")
    with SpAtten().apply(bert) as applied, pytest.raises(BadInput, match="writes no text"):
        applied.generate(**inputs_of(bert))
    with pytest.raises(Refused):
        zoo.method("flap").check(loaded)
