"""The token engine under every architecture, against decoding by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import (
    ARCHITECTURES,
    CASES,
    NEW,
    VIDEO,
    cast,
    clip,
    greedy,
    load,
    pairs,
    picture,
    visual_places,
)

import zoo
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import BadInput, Refused
from zoo.models import LoadedModel

PROMPTS = ("<image>\nWhat is it?", "Look at this: <image> Is it on the left?", "<image>?")
SIZES = ((70, 50), (40, 110), (48, 48))


def sample_inputs(loaded: LoadedModel, samples: tuple[int, ...]) -> dict[str, Any]:
    return dict(
        loaded.processor(
            text=[PROMPTS[s] for s in samples],
            images=[picture(s, *SIZES[s]) for s in samples],
            return_tensors="pt",
            padding=True,
        )
    )


def generate(applied: zoo.Applied, data: dict[str, Any]) -> list[list[int]]:
    ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
    return ids[:, data["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("slug", CASES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_equals_decoding_by_hand(name: str, slug: str, dtype: torch.dtype) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = load(name, dtype)
    data = cast(sample_inputs(loaded, (1,)), dtype)
    expected, lengths = greedy(loaded, data, rule, layer, renumber)
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        assert generate(applied, data) == [expected]
        with torch.no_grad():
            cache = applied(**data, use_cache=True).past_key_values
        report = applied.report
    assert [entry.get_seq_length() for entry in cache.layers] == lengths
    text = data["input_ids"].shape[1] - len(visual_places(loaded, data["input_ids"][0]))
    assert [text + bar.kept for bar in report.bars["visual tokens"]] == lengths
    assert lengths[-1] < data["input_ids"].shape[1]


@pytest.mark.parametrize("slug", CASES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_padded_batch_equals_decoding_by_hand(name: str, slug: str) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = load(name)
    data = sample_inputs(loaded, (0, 1, 2))
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        together = generate(applied, data)
    for sample in range(3):
        assert together[sample] == greedy(loaded, sample_inputs(loaded, (sample,)), rule, layer, renumber)[0]


@pytest.mark.parametrize("slug", CASES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_without_a_picture_beside_one_with_two(name: str, slug: str) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = load(name)
    none, two, pictures = "Only a few words.", "<image> or <image>?", [picture(3), picture(4, 50, 90)]
    options = {"return_tensors": "pt", "padding": True}
    together = dict(loaded.processor(text=[none, two], images=pictures, **options))
    alone = dict(loaded.processor(text=[two], images=pictures, **options))
    with torch.no_grad():
        words = dict(loaded.processor(text=[none], **options))
        dense = loaded.model.generate(**words, max_new_tokens=NEW, do_sample=False)
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        tokens = generate(applied, together)
    assert tokens[0] == dense[0, words["input_ids"].shape[1] :].tolist()
    assert tokens[1] == greedy(loaded, alone, rule, layer, renumber)[0]


@pytest.mark.parametrize("slug", CASES)
@pytest.mark.parametrize("name", VIDEO)
def test_videos(name: str, slug: str) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = load(name)
    prompts, clips = ("<video>\nWhat happens?", "And here: <video> why?"), (clip(1), clip(2))
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        together = generate(applied, dict(loaded.processor(text=prompts, videos=clips)))
    for sample in range(2):
        alone = dict(loaded.processor(text=[prompts[sample]], videos=[clips[sample]]))
        assert together[sample] == greedy(loaded, alone, rule, layer, renumber)[0]


@pytest.mark.parametrize("slug", CASES)
@pytest.mark.parametrize("name", ["tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_a_picture_and_a_video_in_one_prompt(name: str, slug: str) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = load(name)
    data = dict(loaded.processor(text=["<image> and <video>?"], images=[picture(5)], videos=[clip(3)]))
    expected = greedy(loaded, data, rule, layer, renumber)[0]
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        assert generate(applied, data) == [expected]
        assert applied.report.total == len(visual_places(loaded, data["input_ids"][0]))


@pytest.mark.parametrize("layers", [(-1, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_several_stages_with_a_merge_in_a_batch(name: str, layers: tuple[int, int]) -> None:
    """Deep-stacked features are merged like the tokens they belong to: rows of a batch equal single rows."""
    loaded = load(name)

    def few(view: View) -> Keep:
        count = 1 + len(view.text) % 4
        return Keep(view.tokens.float().sum(-1).topk(count).indices.sort().values.unsqueeze(0))

    def run(data: dict[str, Any]) -> list[list[int]]:
        reducer = TokenReducer(
            loaded.anatomy, [Stage(layers[0], pairs), Stage(layers[1], few)], "renumber", "test"
        )
        try:
            ids = loaded.model.generate(**data, max_new_tokens=NEW, do_sample=False)
            return ids[:, data["input_ids"].shape[1] :].tolist()
        finally:
            reducer.close()

    together = run(sample_inputs(loaded, (0, 1, 2)))
    for sample in range(3):
        assert together[sample] == run(sample_inputs(loaded, (sample,)))[0]


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_places_in_a_grid_are_never_renumbered(name: str) -> None:
    loaded = load(name)
    with zoo.method("divprune", keep_ratio=0.3).apply(loaded) as applied, torch.no_grad():
        applied(**sample_inputs(loaded, (0,)))
        assert applied.report.facts["position ids"] == "kept"


@pytest.mark.parametrize("slug", CASES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keeping_everything_is_bit_equal_and_closing_leaves_nothing(name: str, slug: str) -> None:
    loaded = load(name)
    data = sample_inputs(loaded, (0, 1))
    with torch.no_grad():
        loaded.model(**data)  # transformers adds hooks of its own on first use
        before = _traces(loaded)
        dense = loaded.model(**data).logits
        with zoo.method(slug, keep_ratio=1).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)
        reducer = TokenReducer(loaded.anatomy, [Stage(1, lambda view: 1 / 0)], "keep", "test")
        with pytest.raises(ZeroDivisionError):
            loaded.model(**data)
        reducer.close()
        assert _traces(loaded) == before
        assert torch.equal(loaded.model(**data).logits, dense)


def _traces(loaded: LoadedModel) -> dict[str, Any]:
    return {
        name: (
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            sorted(key for key in vars(module) if not key.startswith("_") and key != "rope_deltas"),
            id(getattr(module, "config", None)),
        )
        for name, module in loaded.model.named_modules()
    }


def test_a_prompt_in_chunks_is_refused_in_one_line() -> None:
    loaded = load("tiny-internvl")
    with (
        zoo.method("divprune", keep_ratio=0.5).apply(loaded) as applied,
        pytest.raises(Refused, match="must see the whole prompt at once"),
    ):
        applied.generate(**sample_inputs(loaded, (0,)), prefill_chunk_size=8)


def test_text_alone_is_refused_in_one_line() -> None:
    loaded = load("tiny-qwen3-vl")
    with (
        zoo.method("divprune", keep_ratio=0.5).apply(loaded) as applied,
        pytest.raises(BadInput, match="this input has no image or video"),
    ):
        applied(**loaded.processor(text=["No picture."]))


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_encoders_of_one_long_sequence_refuse_reductions_inside(name: str) -> None:
    with pytest.raises(Refused, match="packs all pictures"):
        zoo.method("tome", restore=True).apply(load(name))
