"""MustDrop against encoder and decoder run by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import cast, load
from staged import Rule, Sequence, inputs, logits_by_hand

import zoo
from zoo.engines.windows import merge_windows
from zoo.errors import BadParameter, Refused
from zoo.methods.visual_tokens.mustdrop import attended
from zoo.models import LoadedModel

SETTINGS: dict[str, Any] = {
    "merge_threshold": 0.2,
    "global_threshold": 0.05,
    "individual_threshold": 0.08,
    "layers": [0, 2],
}


def slow_windows(patches: torch.Tensor, window: int, threshold: float) -> list[list[int]]:
    """Members of each token after merging, by loops."""
    side = math.isqrt(len(patches))
    found: list[tuple[float, list[int]]] = []
    for top in range(0, side, window):
        for left in range(0, side, window):
            members = [(top + y) * side + left + x for y in range(window) for x in range(window)]
            cosines = [
                float(torch.cosine_similarity(patches[a], patches[b], dim=0))
                for a in members
                for b in members
                if a != b
            ]
            found.append((sum(cosines) / len(cosines), members))
    merged = [members for value, members in sorted(found, key=lambda entry: -entry[0]) if value >= threshold]
    taken = {member for members in merged for member in members}
    return merged + [[place] for place in range(len(patches)) if place not in taken]


def test_windows_are_those_of_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 + 81, 6, generator=generator)
    x[1:] += 1.2 * torch.randn(9, 6, generator=generator).repeat_interleave(9, 0)
    for threshold in (-1.0, 0.1, 0.3, 1.1):
        plan = merge_windows(x, 1, 3, threshold)
        members = slow_windows(x[1:], 3, threshold)
        assert plan[0] == 0
        for number, group in enumerate(members):
            assert (plan[1:] == number + 1).nonzero().flatten().tolist() == sorted(group)


def test_alike_windows_are_merged_and_others_are_not() -> None:
    x = torch.randn(36, 8, generator=torch.Generator().manual_seed(0))
    grid = x.view(6, 6, 8)
    grid[3:, :3] = grid[3, 0]
    plan = merge_windows(x, 0, 3, 0.8)
    assert set(plan.view(6, 6)[3:, :3].flatten().tolist()) == {0}
    assert int(plan.max()) == 27


def test_a_token_leaves_only_when_it_is_weak_in_both_ways() -> None:
    total, peak = torch.tensor([0.1, 0.1, 5.0, 5.0]), torch.tensor([0.1, 0.9, 0.1, 0.9])
    assert attended(total, peak, 0.05, 0.5).tolist() == [False, True, True, True]


@torch.no_grad()
def encoded(loaded: LoadedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Projected features on the short sequence ``[n, D]`` and the key tokens, with the encoder run block by block."""
    tower = loaded.model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    blocks = list(tower.encoder.layers)
    assert loaded.model.config.vision_feature_layer == -2
    for number, block in enumerate(blocks[:-1]):
        hidden = block(hidden, attention_mask=None)
        if number == 0:
            patches = hidden[0, 1:]
            groups = slow_windows(patches, 3, SETTINGS["merge_threshold"])
            hidden = torch.stack([hidden[0, 0], *(patches[group].mean(0) for group in groups)]).unsqueeze(0)
    last = blocks[-1]
    normed = last.layer_norm1(hidden)[0]
    heads = last.self_attn.num_heads
    query = last.self_attn.q_proj(normed).view(len(normed), heads, -1)[0]
    keys = last.self_attn.k_proj(normed).view(len(normed), heads, -1)
    row = torch.stack([(keys[:, h] @ query[h] * query.shape[-1] ** -0.5).softmax(0) for h in range(heads)])
    scores = row.mean(0)[1:].tolist()
    key = sorted(range(len(scores)), key=lambda n: -scores[n])[: math.ceil(0.08 * len(scores))]
    return loaded.model.model.multi_modal_projector(hidden[:, 1:])[0], key


def rule(key: set[int]) -> Rule:
    """The dual filter; ``key`` holds places among the visual tokens and is kept up to date."""

    def drop(now: Sequence) -> None:
        rows = now.before.mean(0)[now.visual[-1] + 1 :][:, now.visual]
        whole = float(rows.sum())
        kept = [
            number
            for number in range(len(now.visual))
            if number in key
            or not (float(rows[:, number].sum()) < SETTINGS["global_threshold"] * whole)
            or not (float(rows[:, number].max()) < SETTINGS["individual_threshold"])
        ]
        moved = {new for new, number in enumerate(kept) if number in key}
        key.clear()
        key.update(moved)
        now.cut([now.visual[number] for number in kept], renumber=True)

    return drop


@pytest.mark.parametrize("sample", [0, 1])
def test_equals_encoder_and_decoder_by_hand(sample: int) -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, sample)
    features, key = encoded(loaded, data["pixel_values"])
    assert len(features) < 36
    important = set(key)

    def replaced(now: Sequence) -> None:
        first, end = now.visual[0], now.visual[-1] + 1
        now.hidden = torch.cat((now.hidden[:first], features, now.hidden[end:]))
        now.visual = list(range(first, first + len(features)))
        now.positions = torch.arange(len(now.hidden))

    expected, left = logits_by_hand(loaded, data, {0: replaced, 1: rule(important), 3: rule(important)})
    with zoo.method("mustdrop", **SETTINGS).apply(loaded) as applied, torch.no_grad():
        output = applied(**data, use_cache=True)
        bars = [bar.kept for bar in applied.report.bars["visual tokens"]]
    torch.testing.assert_close(output.logits[0, -1], expected, rtol=1e-4, atol=1e-4)
    assert left[3] <= left[1] < left[0] < 36
    text = data["input_ids"].shape[1] - 36
    # Stage 3: layer 0 is the first that filters, so from there on every cache has only the final survivors.
    lengths = [layer.get_seq_length() - text for layer in output.past_key_values.layers]
    assert lengths == [left[3]] * 4
    assert bars[-1] == left[3]


def test_layers_in_front_of_the_first_filter_keep_their_cache() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, 0)
    with zoo.method("mustdrop", **{**SETTINGS, "layers": [1, 2]}).apply(loaded) as applied, torch.no_grad():
        cache = applied(**data, use_cache=True).past_key_values
        ids = applied.generate(**data, max_new_tokens=4, do_sample=False)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[0] > lengths[1] == lengths[2] == lengths[3]
    assert ids.shape[1] == data["input_ids"].shape[1] + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pictures_that_merge_differently_share_a_batch(dtype: torch.dtype) -> None:
    loaded = load("tiny-llava", dtype)
    data = cast(inputs(loaded, 0, 1, 2), dtype)
    data["pixel_values"][1] = data["pixel_values"][1, :, :1, :1]  # of one colour: more windows are alike
    with zoo.method("mustdrop", **SETTINGS).apply(loaded) as applied, torch.no_grad():
        ids = applied.generate(**data, max_new_tokens=5, do_sample=False)
        together = [len(row) for row in applied.kept[-1]]
        for sample in range(3):
            alone = cast(inputs(loaded, sample), dtype)
            alone["pixel_values"] = data["pixel_values"][sample : sample + 1]
            single = applied.generate(**alone, max_new_tokens=5, do_sample=False)
            assert len(applied.kept[-1][0]) == together[sample]
            if dtype == torch.float32:
                assert ids[sample, -5:].tolist() == single[0, -5:].tolist()
    assert len(set(together)) > 1


def test_nothing_to_merge_and_nothing_to_drop_leaves_the_model_as_it_is() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, 0)
    with torch.no_grad():
        dense = loaded.model(**data).logits
        with zoo.method("mustdrop", merge_threshold=1.1, global_threshold=0).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)
        with zoo.method("mustdrop", **SETTINGS).apply(loaded) as applied:
            assert not torch.equal(applied(**data).logits, dense)
        assert torch.equal(loaded.model(**data).logits, dense)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_a_stack_with_a_method_inside_the_llm(name: str) -> None:
    """The projector runs once for each token of the encoder, and a padded batch equals single samples."""
    loaded = load(name)
    rows: list[int] = []
    first = next(part for part in loaded.anatomy.projector.modules() if isinstance(part, torch.nn.Linear))
    hook = first.register_forward_hook(lambda _, args, output: rows.append(args[0].shape[:-1].numel()))
    settings = {f"mustdrop.{key}": value for key, value in SETTINGS.items()} | {"mustdrop.layers": [0, 1]}
    stack = zoo.method("mustdrop+fastv", **settings, **{"fastv.layer": 3, "fastv.keep_tokens": 2})
    with torch.no_grad(), stack.apply(loaded) as applied:
        cache = applied(**inputs(loaded, 0, 1, 2), use_cache=True).past_key_values
        entered = sum(len(kept) for kept in applied.layers[0].kept[-1])
        together = applied.generate(**inputs(loaded, 0, 1, 2), max_new_tokens=4, do_sample=False)[:, -4:]
        for sample in range(3):
            ids = applied.generate(**inputs(loaded, sample), max_new_tokens=4, do_sample=False)
            assert ids[0, -4:].tolist() == together[sample].tolist()
    hook.remove()
    # Newline tokens and what padding hides are no patches of the encoder that enter the LLM.
    assert rows[0] >= entered if name == "tiny-llava-next" else rows[0] == entered
    assert rows[0] < inputs(loaded, 0, 1, 2)["pixel_values"].flatten(0, -4).shape[0] * 36
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[0] == lengths[1] == lengths[2] > lengths[3]


def test_what_an_architecture_lacks_is_said_in_a_line() -> None:
    with pytest.raises(Refused, match=r"mustdrop needs a vision encoder with \[CLS\]"):
        zoo.method("mustdrop").check(load("tiny-qwen2.5-vl"))
    with pytest.raises(Refused, match="grid that windows of 4 fill"):
        zoo.method("mustdrop", window=4).check(load("tiny-llava"))
    with pytest.raises(BadParameter):
        zoo.method("mustdrop", layers=[3, 1])
