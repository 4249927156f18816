"""TransPrune against its formula in slow loops, and on real architectures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import ARCHITECTURES, cast, decoder_call, load, picture, visual_places
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import zoo
from zoo.engines.selection import scaled_to_mean
from zoo.engines.tokens import View
from zoo.errors import BadInput
from zoo.methods.visual_tokens.transprune import MODULES, TransPrune, token_transition
from zoo.models import LoadedModel

CUTS = {"layers": (1, 2, 3), "keep_ratios": (0.8, 0.5, 0.2)}


def slow_transition(before: torch.Tensor, after: torch.Tensor, absolute: bool) -> list[float]:
    lengths, turns = [], []
    for x, y in zip(before.tolist(), after.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(x, y, strict=True))
        nx, ny = math.sqrt(sum(a * a for a in x)), math.sqrt(sum(b * b for b in y))
        cosine = dot / (nx * ny)
        turns.append(math.exp(1 - (abs(cosine) if absolute else cosine)))
        lengths.append(ny / nx)
    return [length * turn / sum(turns) for length, turn in zip(lengths, turns, strict=True)]


@pytest.mark.parametrize("direction", ["signed", "absolute"])
def test_transition_is_the_papers_formula(direction: Any) -> None:
    before, after = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    found = token_transition(before, after, direction)
    torch.testing.assert_close(found, torch.tensor(slow_transition(before, after, direction == "absolute")))


def prompt(loaded: LoadedModel) -> dict[str, Any]:
    texts = ["<image>\nWhat is it?", "Now <image>, and what is this?", "A <image> b"]
    images = [picture(0), picture(1, 60, 90), picture(2, 48, 48)]
    return dict(loaded.processor(text=texts, images=images, return_tensors="pt", padding=True))


@torch.no_grad()
def plain_first_cut(loaded: LoadedModel, data: dict[str, Any], sample: int, ratio: float) -> list[int]:
    """Kept places after the first layer, from what its modules were called with and a full attention matrix."""
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    seen: dict[str, torch.Tensor] = {}
    first, second = (layer.module for layer in decoder.layers[:2])

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[f"{name}_in"] = given[sample]
            seen[f"{name}_out"] = (output[0] if isinstance(output, tuple) else output)[sample]

        return hook

    hooks = [
        first.self_attn.register_forward_hook(note("attention"), with_kwargs=True),
        first.mlp.register_forward_hook(note("mlp"), with_kwargs=True),
        first.register_forward_hook(note("layer"), with_kwargs=True),
    ]
    loaded.model(**data)
    for hook in hooks:
        hook.remove()
    real = data["attention_mask"][sample].bool()
    ids = data["input_ids"][sample][real]
    places = visual_places(loaded, ids)
    transition = sum(
        torch.tensor(slow_transition(seen[f"{name}_in"][real], seen[f"{name}_out"][real], False))
        for name in ("attention", "mlp")
    )
    attention = second.self_attn
    hidden = second.input_layernorm(seen["layer_out"][real].unsqueeze(0))
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    query, key = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    positions = decoder_call(loaded, data).get("position_ids")
    grid = positions is not None and positions.dim() == 3
    own = positions[-3:, sample, real].unsqueeze(1) if grid else torch.arange(len(ids)).unsqueeze(0)
    rotary = decoder.module.rotary_emb(hidden, position_ids=own)
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * attention.scaling
    scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -float("inf")).softmax(-1)
    rows = scores[0, :, int(places[-1]) + 1 :].mean((0, 1))[places]
    total = transition[places] / transition[places].sum() + rows / rows.sum()
    padding = len(real) - len(ids)
    return sorted((places[total.topk(int(ratio * len(places))).indices] + padding).tolist())


@pytest.mark.parametrize(
    "name",
    [
        "tiny-llava",
        "tiny-llava-next",
        "tiny-llava-onevision",
        "tiny-internvl",
        "tiny-smolvlm",
        "tiny-qwen2.5-vl",
    ],
)
def test_the_first_cut_in_a_padded_batch(name: str) -> None:
    loaded = load(name)
    data = prompt(loaded)
    with TransPrune(**CUTS).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        kept = [rows.tolist() for rows in applied.kept[1]]
    assert kept == [plain_first_cut(loaded, data, sample, 0.8) for sample in range(3)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_order_and_report_on_every_architecture(name: str, dtype: torch.dtype) -> None:
    loaded = load(name, dtype)
    data = cast(prompt(loaded), dtype)
    with TransPrune(**CUTS).apply(loaded) as applied:
        applied.generate(**data, max_new_tokens=3, do_sample=False)
        total = [len(visual_places(loaded, ids)) for ids in data["input_ids"]]
        for layer, ratio in zip(CUTS["layers"], CUTS["keep_ratios"], strict=True):
            kept = applied.kept[layer]
            assert [len(rows) for rows in kept] == [max(1, int(n * ratio)) for n in total]
            assert all(torch.equal(rows, rows.sort().values) for rows in kept)
        assert applied.report.bars["visual tokens"][0].kept == pytest.approx(sum(total) / 3)


def test_strongly_transformed_tokens_stay() -> None:
    """Half of the tokens turn around and grow in the module; the inverted rule would keep the other half."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(20, 8, generator=generator)
    turned = torch.zeros(20, dtype=torch.bool)
    turned[[3, 4, 8, 9, 12]] = True
    after = torch.where(turned.unsqueeze(1), -2 * before, before)
    hidden = {
        (0, place): x.unsqueeze(0) for pair in MODULES for place, x in zip(pair, (before, after), strict=True)
    }
    index, text = torch.arange(2, 17), torch.tensor([0, 1, 17, 18, 19])
    view = View(before[index], index, index, before[text], text, 15, 1, torch.arange(15), _hidden=hidden)
    method = TransPrune(layers=(1,), keep_ratios=(5 / 15 + 1e-9,), transition_weight=1.0)
    decoder = load("tiny-llava").anatomy.decoder
    assert decoder is not None
    kept = method.select(decoder, (1,), 0, range(1), view)
    assert (kept.index[0] + 2).tolist() == [3, 4, 8, 9, 12]


def test_ttv_alone_asks_for_no_attention() -> None:
    loaded = load("tiny-qwen2.5-vl")
    looking_back = {**CUTS, "attention_of": "last-layer"}
    assert TransPrune(**looking_back).stages(loaded.anatomy)[0].observes == (0,)
    assert TransPrune(**looking_back, transition_weight=1.0).stages(loaded.anatomy)[0].observes == ()
    with pytest.raises(BadInput, match="first_layer=3"):
        TransPrune(**CUTS, first_layer=3).stages(loaded.anatomy)


@given(
    ratios=st.lists(st.floats(0.01, 1), min_size=1, max_size=4).map(lambda x: tuple(sorted(x, reverse=True))),
    way=st.floats(0.01, 1),
)
def test_a_scaled_schedule_meets_its_mean(ratios: tuple[float, ...], way: float) -> None:
    layers, depth = tuple(range(3, 3 + 2 * len(ratios), 2)), 20
    mean = 3 / depth + way * (1 - 3 / depth)
    found = scaled_to_mean(ratios, layers, depth, mean)
    seen = [*found[:-1], *found[:-1]] + [found[-1]] * (depth - layers[-1])
    assert (3 + sum(seen)) / depth == pytest.approx(mean, rel=1e-6)
    assert max(found) <= 1 + 1e-9
    assert list(found) == sorted(found, reverse=True)


def test_the_default_schedule_is_the_papers() -> None:
    ratios = TransPrune().schedule(576, (7, 9, 12), 32)
    kept = [576] * 7 + [int(576 * r) for r, n in zip(ratios, (2, 3, 20), strict=True) for _ in range(n)]
    assert sum(kept) / 32 == pytest.approx(236.25)
    assert TransPrune(keep_ratio=0.3).schedule(576, (7, 9, 12), 32)[0] < ratios[0]
    with pytest.raises(BadInput, match="earlier layers"):
        TransPrune(keep_ratio=0.2).schedule(576, (7, 9, 12), 32)
    with pytest.raises(BadInput, match="only 576"):
        TransPrune(keep_tokens=600).schedule(576, (7, 9, 12), 32)


def test_keeping_everything_changes_no_bit() -> None:
    loaded = load("tiny-llava")
    data = prompt(loaded)
    with torch.no_grad():
        dense = loaded.model(**data).logits
        with TransPrune(keep_ratio=1.0).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)


def test_behind_another_method_ratios_are_of_what_is_left() -> None:
    loaded = load("tiny-llava")
    stack = zoo.method("divprune+transprune", **{"divprune.keep_tokens": 20, **CUTS})
    with stack.apply(loaded) as applied, torch.no_grad():
        applied(**prompt(loaded))
        lengths = [bar.kept for bar in applied.layers[0].report.bars["visual tokens"]]
    assert lengths == [20, 16, 10, 4]
