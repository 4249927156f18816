"""LVLM_CSP against a decoder run by hand, whose sequence shrinks, grows and shrinks again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import cast, decoder_call, last_row, load, picture, visual_places
from transformers import DynamicCache

import zoo
from zoo.errors import BadInput, Refused
from zoo.methods.visual_tokens.lvlm_csp import LvlmCsp, nearest, scattered
from zoo.models import LoadedModel
from zoo.overlays import record

NEW = 5
MIDDLE, LATE = 1, 2
"""8 and 16 of 32, in the four layers of the tiny models."""


def farthest(x: torch.Tensor, count: int) -> list[int]:
    unit = x.float() / x.float().norm(dim=-1, keepdim=True)
    distance = (1 - unit @ unit.T).tolist()
    size = len(distance)
    alone = [min(distance[i][j] for j in range(size) if j != i) for i in range(size)]
    chosen = [alone.index(max(alone))]
    while len(chosen) < count:
        gaps = [-1.0 if i in chosen else min(distance[i][j] for j in chosen) for i in range(size)]
        chosen.append(gaps.index(max(gaps)))
    return sorted(chosen)


def come_back(embeddings: torch.Tensor, states: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Token by token; ``states`` are those of ``chosen``."""
    rows = []
    for number, embedding in enumerate(embeddings):
        if number in chosen:
            rows.append(states[chosen.index(number)])
            continue
        cosines = [float(torch.cosine_similarity(embedding, embeddings[r], dim=0)) for r in chosen]
        best = cosines.index(max(cosines))
        rows.append(embedding + states[best] - embeddings[chosen[best]])
    return torch.stack(rows)


@torch.no_grad()
def by_hand(loaded: LoadedModel, data: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Greedy tokens of one sample, and the length of each layer's cache after the prompt."""
    called = decoder_call(loaded, data)
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    inner = decoder.module
    embeddings = called["inputs_embeds"][0]
    length = len(embeddings)
    visual = visual_places(loaded, data["input_ids"][0]).tolist()
    positions = called.get("position_ids")
    grid = positions is not None and positions.dim() == 3
    positions = positions[-3:] if grid else torch.arange(length).unsqueeze(0)
    following = int(positions.max()) + 1
    deep = []
    for level in called.get("deepstack_visual_embeds") or []:
        deep.append(torch.zeros_like(embeddings))
        deep[-1][visual] = level
    cache = DynamicCache(config=decoder.config)

    chosen = farthest(embeddings[visual], round(len(visual) / 4))
    early = {visual[number] for number in chosen}
    here = [place for place in range(length) if place not in visual or place in early]
    hidden, row = embeddings[here], torch.empty(0)
    for number, block in enumerate(inner.layers):
        if number == MIDDLE:
            whole = torch.zeros_like(embeddings)
            whole[here] = hidden
            states = hidden[[here.index(place) for place in visual if place in early]]
            whole[visual] = come_back(embeddings[visual], states, chosen)
            hidden, here = whole, list(range(length))
        if number == LATE:
            stays = row.mean(0)[visual].topk(round(len(visual) / 16)).indices.tolist()
            late = {visual[number] for number in stays}
            here = [place for place in range(length) if place not in visual or place in late]
            hidden = hidden[here]
        rotary = inner.rotary_emb(hidden.unsqueeze(0), position_ids=positions[..., here])
        if number == LATE - 1:
            row = last_row(block, hidden.unsqueeze(0), rotary)
        given = {"position_embeddings": rotary, "past_key_values": cache, "use_cache": True}
        hidden = block(hidden.unsqueeze(0), attention_mask=None, **given)[0]
        if number < len(deep):
            hidden = hidden + deep[number][here]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    tokens = [int(loaded.model.lm_head(inner.norm(hidden[-1:])).argmax(-1))]
    for number in range(NEW - 1):
        new = decoder.embed(torch.tensor([[tokens[-1]]]))
        place = torch.tensor([[following + number]])
        rotary = inner.rotary_emb(new, position_ids=place.expand(3, 1, 1) if grid else place)
        for block in inner.layers:
            given = {"position_embeddings": rotary, "past_key_values": cache, "use_cache": True}
            new = block(new, attention_mask=None, **given)
        tokens.append(int(loaded.model.lm_head(inner.norm(new)).argmax(-1)))
    return tokens, lengths


TEXTS = ["<image>\na", "Look here: <image>\nis it longer?", "so <image>\nthen"]


def inputs(loaded: LoadedModel, samples: tuple[int, ...]) -> dict[str, Any]:
    data = loaded.processor(
        images=[picture(s) for s in samples],
        text=[TEXTS[s] for s in samples],
        return_tensors="pt",
        padding=True,
    )
    return cast(data, loaded.model.dtype)


@pytest.mark.parametrize(
    "model", ["tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-internvl"]
)
def test_generate_equals_a_run_by_hand(model: str) -> None:
    loaded = load(model)
    expected = [by_hand(loaded, inputs(loaded, (sample,))) for sample in range(3)]
    with torch.no_grad(), zoo.method("lvlm-csp").apply(loaded) as applied:
        for sample in range(3):
            data = inputs(loaded, (sample,))
            ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            assert ids[0, data["input_ids"].shape[1] :].tolist() == expected[sample][0]
            cache = applied(**data, use_cache=True).past_key_values
            assert [layer.get_seq_length() for layer in cache.layers] == expected[sample][1]
            text = data["input_ids"].shape[1] - int(applied.reducer.visual_total[0])
            bars = applied.report.bars["visual tokens"]
            assert [round(bar.kept) + text for bar in bars] == expected[sample][1]
        data = inputs(loaded, (0, 1, 2))
        together = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
    assert together[:, data["input_ids"].shape[1] :].tolist() == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_several_new_tokens_at_once_see_what_single_ones_see(attention: str) -> None:
    loaded = load("tiny-llava")
    loaded.model.set_attn_implementation(attention)
    data = inputs(loaded, (0, 1))
    more = torch.tensor([[7, 8, 9], [20, 21, 22]])
    with torch.no_grad(), zoo.method("lvlm-csp").apply(loaded) as applied:
        found = []
        for size in (3, 1):
            cache = applied(**data, use_cache=True).past_key_values
            mask, logits = data["attention_mask"], []
            for chunk in more.split(size, dim=1):
                mask = torch.cat((mask, torch.ones_like(chunk)), dim=1)
                step = applied(input_ids=chunk, attention_mask=mask, past_key_values=cache, use_cache=True)
                logits.append(step.logits)
            found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_bf16_keeps_the_budget_and_the_order() -> None:
    loaded = load("tiny-llava", torch.bfloat16)
    with torch.no_grad(), zoo.method("lvlm-csp").apply(loaded) as applied:
        logits = applied(**inputs(loaded, (0, 1, 2))).logits
    assert logits.isfinite().all()
    assert [[len(rows) for rows in kept] for kept in applied.kept.values()] == [[9] * 3, [36] * 3, [2] * 3]
    for kept in applied.kept.values():
        assert all(rows.tolist() == sorted(rows.tolist()) for rows in kept)


def test_nothing_is_left_behind_after_an_error() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 1))
    with torch.no_grad():
        dense = loaded.model(**data).logits
    with pytest.raises(BadInput), zoo.method("lvlm-csp").apply(loaded) as applied:
        applied(input_ids=torch.tensor([[5, 6]]))
    with torch.no_grad():
        assert torch.equal(loaded.model(**data).logits, dense)


def test_a_token_comes_back_with_the_update_of_the_one_it_resembles() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    chosen = torch.tensor([0, 2])
    member = nearest(embeddings, chosen)
    assert member.tolist() == [0, 0, 1, 1]
    now = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    expected = torch.tensor([[3.0, 0.0], [2.9, 0.1], [0.0, -4.0], [0.1, -4.1]])
    torch.testing.assert_close(scattered(now, embeddings, chosen, member, True), expected)
    bare = scattered(now, embeddings, chosen, member, False)
    assert bare.tolist() == [[3.0, 0.0], embeddings[1].tolist(), [0.0, -4.0], embeddings[3].tolist()]


def test_representatives_cover_what_their_inverse_misses() -> None:
    """Three groups of equal tokens: farthest points take one of each, the least distant ones do not."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 8) * 5
    x = centres.repeat_interleave(10, 0) + 0.05 * torch.randn(30, 8, generator=generator)
    loaded = load("tiny-llava")
    view = zoo.engines.tokens.View(
        tokens=x, index=torch.arange(30), original=torch.arange(30), text=x[:0],
        text_index=torch.arange(0), total=30, layer=-1,
    )  # fmt: skip
    kept = LvlmCsp().cluster(loaded.anatomy, 0.1, view).index[0]
    assert (kept // 10).tolist() == [0, 1, 2]
    assert (view.memory["representative"] == torch.arange(30) // 10).all()


@pytest.mark.parametrize("options", [{"representatives": "attention"}, {"scatter": "embedding"}])
def test_the_other_rules_choose_or_compute_something_else(options: dict[str, str]) -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0,))
    outcomes = []
    for chosen in ({}, options):
        with torch.no_grad(), zoo.method("lvlm-csp", **chosen).apply(loaded) as applied:
            logits = applied(**data).logits
        outcomes.append((logits, [len(rows[0]) for rows in applied.kept.values()]))
    assert outcomes[0][1] == outcomes[1][1] == [9, 36, 2]
    assert not torch.allclose(outcomes[0][0], outcomes[1][0])


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
def test_the_mean_over_layers_is_the_ratio_asked_for(ratio: float) -> None:
    early, late = LvlmCsp(keep_ratio=ratio).shares(0.25, 0.5)
    assert 0 < late <= early <= 1
    assert 0.25 * early + 0.25 + 0.5 * late == pytest.approx(ratio)


def test_what_cannot_be_done_is_said_in_one_line() -> None:
    loaded = load("tiny-llava")
    with pytest.raises(BadInput, match="its middle layers take"):
        zoo.method("lvlm-csp", keep_ratio=0.2).apply(loaded)
    with pytest.raises(ValueError, match="ascend"):
        LvlmCsp(layers=(3, 2))
    with pytest.raises(Refused, match="divprune and lvlm-csp both prune before the LLM"):
        zoo.method("divprune+lvlm-csp").apply(loaded)
    with pytest.raises(Refused, match="that fastv removes before layer 1: move fastv behind it"):
        zoo.method("lvlm-csp+fastv", **{"fastv.layer": 1, "lvlm-csp.layers": [2, 3]}).apply(loaded)


@pytest.mark.parametrize(
    "other", [{"random-tokens.schedule": {3: 0.5}}, {"fastv.layer": 3, "fastv.keep_tokens": 2}]
)
@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen3-vl"])
def test_a_method_behind_the_return_finds_what_is_left(model: str, other: dict[str, Any]) -> None:
    loaded = load(model)
    slug = next(iter(other)).partition(".")[0]
    stack = zoo.method(f"lvlm-csp+{slug}", **other, **{"lvlm-csp.layers": [1, 2], "lvlm-csp.keep_ratio": 0.6})
    with torch.no_grad(), stack.apply(loaded) as applied:
        data = inputs(loaded, (0, 1, 2))
        cache = applied(**data, use_cache=True).past_key_values
        together = applied.generate(**data, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
        first, second = applied.reports
        alone = [
            applied.generate(**inputs(loaded, (sample,)), max_new_tokens=NEW, do_sample=False)[0, -NEW:]
            for sample in range(3)
        ]
    assert together.tolist() == [tokens.tolist() for tokens in alone]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[0] < lengths[1] > lengths[2] > lengths[3]
    left = [[bar.kept for bar in report.bars["visual tokens"]] for report in (first, second)]
    assert left[0][1] == first.total > left[0][0]
    assert left[1][:3] == [first.total] * 3 > left[1][3:]


def test_keep_ratio_one_changes_nothing() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 1))
    with torch.no_grad():
        dense = loaded.model(**data).logits
        with zoo.method("lvlm-csp", keep_ratio=1).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)


def test_the_picture_of_a_run_shows_the_return() -> None:
    loaded = load("tiny-llava")
    with zoo.method("lvlm-csp").apply(loaded) as applied:
        trace = record(applied, **inputs(loaded, (0, 1)))[1]
        late = applied.kept[LATE][1] - int(applied.kept[MIDDLE][1][0])
    assert [(step.layer, step.kept) for step in trace.steps] == [(-1, 9), (MIDDLE, 36), (LATE, 2)]
    assert trace.steps[1].owner.tolist() == list(range(36))
    assert (trace.steps[2].owner >= 0).nonzero().squeeze(-1).tolist() == late.tolist()
