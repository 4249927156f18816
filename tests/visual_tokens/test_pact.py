"""PACT against its clustering in rounds, and against a model run by hand with the sizes in every mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import cast, decoder_call, load, picture, visual_places
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import zoo
from zoo.engines.upcoming import upcoming_keys
from zoo.errors import Refused
from zoo.methods.visual_tokens.pact import PACT, density_centres, importance
from zoo.models import LoadedModel

NEW, LAYER = 5, 2
OPTIONS: dict[str, Any] = {"layer": LAYER, "cutoff": 0.5, "important_ratio": 0.7, "recovery": 1.2}


def centres_in_rounds(distances: torch.Tensor, cutoff: float) -> list[int]:
    """As the paper has it: all local maxima of the density at once, until every point is near a centre."""
    number = len(distances)
    density = [
        math.fsum(math.exp(-((float(distances[i, j]) / 2) ** 2)) for j in range(number))
        for i in range(number)
    ]
    left, centres = set(range(number)), []
    while left:
        found = [
            i
            for i in left
            if all(float(distances[i, j]) > cutoff for j in left if j != i and density[j] >= density[i])
        ]
        centres += found
        left = {j for j in left if all(float(distances[i, j]) > cutoff for i in found)}
    return sorted(centres)


def clusters(hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor, turned: torch.Tensor) -> list[list[int]]:
    """Members of each cluster, centre first, by plain loops; ``q, k [H, N, d]`` and ``turned [N, H * d]``."""
    number = len(hidden)
    scores = torch.zeros(number)
    for head in range(len(q)):
        row = (k[head] @ q[head].mean(0) / math.sqrt(q.shape[-1])).softmax(-1)
        scores += row / len(q)
    scores = scores * hidden.norm(dim=-1)
    threshold = scores.sort(descending=True).values[int(number * OPTIONS["important_ratio"]) - 1]
    strong = [i for i in range(number) if scores[i] > threshold]
    unit = turned / turned.norm(dim=-1, keepdim=True)
    distances = (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)
    centres = [strong[i] for i in centres_in_rounds(distances[strong][:, strong], OPTIONS["cutoff"])]
    members = {centre: [centre] for centre in centres}
    for i in range(number):
        nearest = min(centres, key=lambda centre: float(distances[i, centre]))
        if i not in members and (
            i in strong or float(distances[i, nearest]) <= OPTIONS["recovery"] * OPTIONS["cutoff"]
        ):
            members[nearest].append(i)
    return [members[centre] for centre in centres]


@torch.no_grad()
def by_hand(loaded: LoadedModel, data: dict[str, torch.Tensor], weighed: bool) -> tuple[list[int], list[int]]:
    """Greedy tokens, and the sizes of the clusters."""
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    inner, head = decoder.module, loaded.model.lm_head
    hidden = decoder_call(loaded, data)["inputs_embeds"]
    length = hidden.shape[1]
    positions = torch.arange(length).unsqueeze(0)
    bias = torch.zeros(length)
    cache = DynamicCache(config=decoder.config)
    sizes: list[int] = []

    def step(number: int, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        keys = (cache.get_seq_length(number) if number < len(cache.layers) else 0) + x.shape[1]
        mask = torch.zeros(x.shape[1], keys)
        mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu(keys - x.shape[1] + 1), -1e30)
        if number >= LAYER:
            mask[:, : len(bias)] += bias
        return inner.layers[number](
            x,
            attention_mask=mask[None, None],
            position_embeddings=inner.rotary_emb(x, position_ids=place),
            past_key_values=cache,
            use_cache=True,
        )

    for number, block in enumerate(inner.layers):
        if number == LAYER:
            places = visual_places(loaded, data["input_ids"][0])
            normed = block.input_layernorm(hidden)
            shape = (length, -1, block.self_attn.head_dim)
            q = block.self_attn.q_proj(normed).view(shape).transpose(0, 1)
            k = block.self_attn.k_proj(normed).view(shape).transpose(0, 1)
            k = k.repeat_interleave(len(q) // len(k), 0)
            turned = apply_rotary_pos_emb(
                q[None], k[None], *inner.rotary_emb(hidden, position_ids=positions)
            )[1][0]
            own = hidden[0, places]
            found = clusters(own, q[:, places], k[:, places], turned[:, places].transpose(0, 1).flatten(1))
            hidden = hidden.clone()
            bias = torch.zeros(length)
            for members in found:
                hidden[0, places[members[0]]] = own[members].mean(0)
                bias[places[members[0]]] = math.log(len(members)) if weighed else 0.0
            sizes = [len(members) for members in found]
            gone = set(places.tolist()) - {int(places[members[0]]) for members in found}
            stay = torch.tensor([place for place in range(length) if place not in gone])
            hidden, positions, bias = hidden[:, stay], positions[:, stay], bias[stay]
        hidden = step(number, hidden, positions)
    tokens = [int(head(inner.norm(hidden[:, -1:])).argmax(-1))]
    for number in range(NEW - 1):
        x = decoder.embed(torch.tensor([[tokens[-1]]]))
        for depth in range(len(inner.layers)):
            x = step(depth, x, torch.tensor([[length + number]]))
        tokens.append(int(head(inner.norm(x)).argmax(-1)))
    return tokens, sizes


def batch(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    texts = ["<image>\nwhat?", "<image>\nis it a longer question?", "look: <image>\nand?"]
    pictures = [picture(number) for number in range(3)]
    return dict(loaded.processor(images=pictures, text=texts, return_tensors="pt", padding=True))


@pytest.mark.parametrize("weighed", [True, False])
def test_generate_equals_the_model_run_by_hand(weighed: bool) -> None:
    loaded = load("tiny-llava")
    data = batch(loaded)
    with zoo.method("pact", **OPTIONS, proportional_attention=weighed).apply(loaded) as applied:
        together = applied.generate(**data, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
        kept = applied.kept[LAYER]
        cache = applied(**data, use_cache=True).past_key_values
        bars = [bar.kept for bar in applied.report.bars["visual tokens"]]
    assert cache.layers[LAYER].get_seq_length() < cache.layers[LAYER - 1].get_seq_length()
    assert bars[LAYER] == pytest.approx(sum(len(places) for places in kept) / 3)
    for sample in range(3):
        real = data["attention_mask"][sample].bool()
        single = {name: value[sample : sample + 1] for name, value in data.items()}
        single |= {name: single[name][:, real] for name in ("input_ids", "attention_mask")}
        tokens, sizes = by_hand(loaded, single, weighed)
        assert together[sample].tolist() == tokens
        assert len(kept[sample]) == len(sizes)
        assert max(sizes) > 1


def test_the_sizes_reach_the_logits_also_while_decoding() -> None:
    loaded = load("tiny-llava")
    data = batch(loaded)
    logits = []
    for weighed in (True, False):
        with (
            torch.no_grad(),
            zoo.method("pact", **OPTIONS, proportional_attention=weighed).apply(loaded) as applied,
        ):
            cache = applied(**data, use_cache=True).past_key_values
            mask = torch.cat((data["attention_mask"], torch.ones(3, 1, dtype=torch.long)), dim=1)
            step = applied(
                input_ids=torch.tensor([[5], [6], [7]]), attention_mask=mask, past_key_values=cache
            )
            logits.append(step.logits[:, -1])
    assert not torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("cutoff", [0.1, 0.6, 1.5])
def test_the_greedy_centres_are_those_of_the_rounds(cutoff: float) -> None:
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    unit = points / points.norm(dim=-1, keepdim=True)
    distances = (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)
    centres = density_centres(distances, cutoff, 2.0).tolist()
    assert centres == centres_in_rounds(distances, cutoff)
    assert all(distances[i, j] > cutoff for i in centres for j in centres if i != j)
    assert bool((distances[:, centres].min(1).values <= cutoff).all())


def test_copies_become_one_and_distant_important_tokens_survive() -> None:
    generator = torch.Generator().manual_seed(8)
    planted = torch.eye(6, 32)
    keys = torch.cat((planted, torch.ones(10, 32) + 0.01 * torch.randn(10, 32, generator=generator)))
    unpruned = torch.ones(16, dtype=torch.bool)
    merge = PACT().merge(keys, unpruned)
    assert merge.anchor[0, :6].tolist() == list(range(6))
    assert merge.sizes()[0].tolist() == [1] * 6 + [10]
    assert merge.anchor[0].tolist() == sorted(merge.anchor[0].tolist())


def test_important_tokens_are_those_the_mean_query_looks_at() -> None:
    generator = torch.Generator().manual_seed(9)
    queries = 0.1 * torch.randn(4, 20, 8, generator=generator) + 1
    keys = 0.1 * torch.randn(2, 20, 8, generator=generator)  # two groups of two heads
    keys[:, [3, 11, 17]] += 2
    scores = importance(queries, keys, torch.ones(20, 16))
    assert PACT(important_ratio=0.2).unpruned(scores).nonzero().squeeze(-1).tolist() == [3, 11, 17]
    assert int(PACT(important_ratio=0.2, exact_share=True).unpruned(scores).sum()) == 4
    torch.testing.assert_close(scores, importance(queries, keys.repeat_interleave(2, 0), torch.ones(20, 16)))


def test_the_coming_keys_are_those_of_the_layer() -> None:
    loaded = load("tiny-llava", torch.bfloat16)
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    layer = decoder.layers[1]
    hidden = torch.randn(7, decoder.hidden_size).bfloat16()
    keys = upcoming_keys(layer, hidden)
    plain = layer.module.self_attn.k_proj(layer.module.input_layernorm(hidden))
    assert torch.equal(keys.transpose(0, 1).flatten(1), plain)


def test_everything_is_undone_and_nothing_left_to_remove_costs_nothing() -> None:
    loaded = load("tiny-llava")
    data = batch(loaded)
    with torch.no_grad():
        before = loaded.model(**data).logits
        with zoo.method("pact", important_ratio=1, cutoff=0, layer=LAYER).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, before)
        with pytest.raises(IndexError), zoo.method("pact", **OPTIONS).apply(loaded) as applied:
            applied(**{**data, "input_ids": data["input_ids"] + 5000})
        hooked = [
            m for m in loaded.model.modules() if m._forward_pre_hooks and "layer" in type(m).__name__.lower()
        ]
        assert not hooked
        assert torch.equal(loaded.model(**data).logits, before)


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_places_in_a_grid(name: str, dtype: torch.dtype) -> None:
    """Keys are clustered as the layer turns them; a padded batch equals single samples."""
    loaded = load(name, dtype)
    texts = ["<image>\nwhat?", "<image>\nis it a longer question?"]

    def run(*samples: int) -> list[list[int]]:
        pictures = [picture(sample, 64, 64) for sample in samples]
        data = loaded.processor(images=pictures, text=[texts[s] for s in samples], return_tensors="pt")
        with zoo.method("pact", **OPTIONS).apply(loaded) as applied:
            ids = applied.generate(**cast(data, dtype), max_new_tokens=NEW, do_sample=False)
            assert 0 < applied.report.kept < applied.report.total
        return ids[:, -NEW:].tolist()

    together = run(0, 1)
    if dtype == torch.float32:
        assert together == [run(0)[0], run(1)[0]]


def test_in_a_stack_keys_weigh_what_they_weigh_alone() -> None:
    """FastV behind PACT, in a padded batch and one by one: the weights go with their tokens."""
    loaded = load("tiny-llava")
    data = batch(loaded)
    logits = {}
    for weighed in (True, False):
        settings = {f"pact.{name}": value for name, value in OPTIONS.items()} | {"fastv.keep_ratio": 0.5}
        settings |= {"fastv.layer": 3, "pact.proportional_attention": weighed}
        with torch.no_grad(), zoo.method("pact+fastv", **settings).apply(loaded) as applied:
            output = applied(**data, use_cache=True)
            tokens = applied.generate(**data, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
            assert [report.method for report in applied.reports] == ["pact", "fastv"]
            alone = []
            for sample in range(3):
                real = data["attention_mask"][sample].bool()
                single = {name: value[sample : sample + 1] for name, value in data.items()}
                single |= {name: single[name][:, real] for name in ("input_ids", "attention_mask")}
                alone.append(applied.generate(**single, max_new_tokens=NEW, do_sample=False)[0, -NEW:])
        lengths = [layer.get_seq_length() for layer in output.past_key_values.layers]
        assert lengths[1] > lengths[2] > lengths[3]
        assert tokens.tolist() == [row.tolist() for row in alone]
        logits[weighed] = output.logits[:, -1]
    assert not torch.allclose(logits[True], logits[False], atol=1e-4)


def test_flash_kernels_take_no_bias() -> None:
    loaded = load("tiny-llava")
    loaded.anatomy.decoder.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Refused, match="proportional_attention=False"):
        PACT().check(loaded)
    PACT(proportional_attention=False).check(loaded)
