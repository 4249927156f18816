"""The incremental index against a slow scan of the whole sequence, and the method on models."""

from __future__ import annotations

import pytest
import torch
from decoders import PAD, build, left_padded, plain, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.engines.ngrams import NgramIndex
from zoo.errors import BadParameter
from zoo.methods.decoding.prompt_lookup import Rule, lookup


def scan(
    tokens: list[int], max_ngram: int, count: int, rule: Rule, eos: set[int], max_length: int
) -> list[int]:
    """Every match of every n-gram, from the left, by brute force."""
    length = len(tokens)
    for n in range(min(max_ngram, length - 1), 0, -1):
        for match in range(length - n + 1):
            if tokens[match : match + n] != tokens[length - n :]:
                continue
            start = match + n
            end = start + count
            if rule == "official":
                if end <= length and start < length - n:
                    return tokens[start:end]
            elif start < (end := min(end, length, max_length)):
                chunk = tokens[start:end]
                for place, token in enumerate(chunk):
                    if token in eos:
                        return chunk[:place]
                return chunk
    return []


@settings(max_examples=400)
@given(
    parts=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5),
    max_ngram=st.integers(1, 5),
    count=st.integers(1, 8),
    rule=st.sampled_from(["official", "transformers"]),
    room=st.integers(-6, 4),
)
def test_the_index_finds_what_a_scan_finds(
    parts: list[list[int]], max_ngram: int, count: int, rule: Rule, room: int
) -> None:
    index = NgramIndex(range(1, max_ngram + 1))
    tokens: list[int] = []
    for part in parts:  # the index grows as generation does
        index.extend(part)
        tokens += part
        limit = max(len(tokens) + room, 0)
        assert lookup(index, count, rule, {3}, limit)[0] == scan(tokens, max_ngram, count, rule, {3}, limit)


def test_official_wants_the_whole_draft_behind_the_match() -> None:
    index = NgramIndex([1, 2])
    index.extend([7, 8, 1, 2, 7, 8])
    assert lookup(index, 3, "official") == ([1, 2, 7], 2)
    assert lookup(index, 5, "official") == ([], 0)
    assert lookup(index, 5, "transformers") == ([1, 2, 7, 8], 2)
    assert lookup(index, 5, "transformers", eos={2}) == ([1], 2)


@pytest.mark.parametrize("rule", ["official", "transformers"])
@pytest.mark.parametrize("kind", ["mha", "gqa", "sliding"])
def test_greedy_output_is_that_of_generate(kind: str, rule: str) -> None:
    loaded = build(kind, initializer_range=0.02)  # so small that the model repeats itself
    ids = prompts(1, 20)
    with zoo.method("prompt-lookup", rule=rule).apply(loaded) as applied:
        out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=80)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=80))
    stats = applied.report.decoding
    assert stats is not None
    assert sum(stats.accepted) > 0
    assert stats.tokens_per_step > 1
    assert applied.report.kept < 80


def test_a_padded_batch_gives_what_single_prompts_give() -> None:
    loaded = build(initializer_range=0.02)
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((9, 25, 14))]
    ids, mask = left_padded(rows)
    applied = zoo.method("prompt-lookup", draft_tokens=4).apply(loaded)
    out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=50)
    for row, line in zip(rows, out, strict=True):
        single = applied.generate(input_ids=row[None], do_sample=False, max_new_tokens=50)
        assert torch.equal(line[ids.shape[1] :], single[0, len(row) :])
        assert torch.equal(single, plain(loaded, row[None], max_new_tokens=50))


def test_a_prompt_without_any_match_is_plain_decoding() -> None:
    loaded = build(initializer_range=0.3)
    ids = torch.arange(3, 8).unsqueeze(0)  # too short for ten tokens behind any match
    applied = zoo.method("prompt-lookup").apply(loaded)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=3)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=3))
    stats = applied.report.decoding
    assert stats is not None
    assert stats.drafted == [0, 0]


def test_one_token_prompts() -> None:
    loaded = build()
    ids = torch.tensor([[5]])
    out = (
        zoo.method("prompt-lookup").apply(loaded).generate(input_ids=ids, do_sample=False, max_new_tokens=20)
    )
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=20))


def test_two_prompts_in_a_row_do_not_leak() -> None:
    loaded = build(initializer_range=0.02)
    applied = zoo.method("prompt-lookup").apply(loaded)
    first, second = prompts(seed=1), prompts(seed=2)
    alone = zoo.method("prompt-lookup").apply(loaded)
    alone.generate(input_ids=second, do_sample=False, max_new_tokens=30)
    applied.generate(input_ids=first, do_sample=False, max_new_tokens=30)
    applied.generate(input_ids=second, do_sample=False, max_new_tokens=30)
    assert applied.trace == alone.trace


def test_sampling_is_reproducible_and_follows_the_seed() -> None:
    loaded = build(initializer_range=0.02)
    applied = zoo.method("prompt-lookup").apply(loaded)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(applied.generate(input_ids=prompts(), do_sample=True, temperature=0.7, max_new_tokens=30))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    "parameters", [{"max_ngram": 0}, {"draft_tokens": 0}, {"rule": "strict"}, {"ngram": 2}]
)
def test_bad_parameters(parameters: dict[str, object]) -> None:
    with pytest.raises(BadParameter, match=next(iter(parameters))):
        zoo.method("prompt-lookup", **parameters)


def test_it_stands_on_a_method_that_shortens_the_prompt() -> None:
    """Layers of different cache lengths: chains are cropped in each, and the output is that of the method alone."""
    from zoo.models.tiny import tiny_model

    model, processor = tiny_model("tiny-llava")
    loaded = zoo.LoadedModel(model, processor)
    image = model.config.image_token_id
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(40, 60, (1, 12), generator=generator)
    ids = torch.cat((text[:, :4], torch.full((1, patches), image), text[:, 4:]), dim=1)
    size = model.config.vision_config.image_size
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, size, size, generator=generator),
        "max_new_tokens": 40,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    with zoo.method("fastv", layer=1, keep_ratio=0.5).apply(loaded) as alone:
        expected = alone.generate(**inputs)
    with zoo.method("fastv+prompt-lookup", layer=1, keep_ratio=0.5, max_ngram=1, draft_tokens=2).apply(
        loaded
    ) as both:
        out = both.generate(**inputs, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    lengths = {layer.keys.shape[-2] for layer in out.past_key_values.layers}
    assert len(lengths) == 2
    stats = both.report.decoding
    assert stats is not None
    assert sum(stats.drafted) > 0
