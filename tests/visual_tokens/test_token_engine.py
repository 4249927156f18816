"""The token engine against references that build short sequences and per-layer caches by hand."""

from __future__ import annotations

import pytest
import torch
from reference import NEW, Rule, pairs, plain_divprune, plain_fastv
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import zoo
from zoo.engines.probes import tap_attention
from zoo.engines.reductions import Keep, Transform
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import BadInput, Refused
from zoo.interface import Method
from zoo.models import LoadedModel

IMAGE = 3
PATCHES = 16


def build(dtype: torch.dtype = torch.float32, text: str = "llama", spread: float = 0.4) -> LoadedModel:
    torch.manual_seed(5)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}[text]
    language = config_class(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=spread,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=language, image_token_id=IMAGE)
    )
    return LoadedModel(model.to(dtype).eval())


def inputs(batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, left-padded, one image each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample in range(batch):
        before = torch.randint(4, 64, (2 + sample,), generator=generator)
        after = torch.randint(4, 64, (3 + 2 * sample,), generator=generator)
        rows.append(torch.cat((before, torch.full((PATCHES,), IMAGE), after)))
    length = max(len(row) for row in rows)
    ids = torch.zeros(batch, length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for sample, row in enumerate(rows):
        ids[sample, length - len(row) :] = row
        mask[sample, length - len(row) :] = 1
    pixels = torch.randn(batch, 3, 56, 56, generator=generator).to(dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def single(batch: dict[str, torch.Tensor], sample: int) -> dict[str, torch.Tensor]:
    real = batch["attention_mask"][sample].bool()
    return {
        "input_ids": batch["input_ids"][sample : sample + 1, real],
        "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
        "pixel_values": batch["pixel_values"][sample : sample + 1],
    }


def embeddings(loaded: LoadedModel, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """Prompt embeddings with the projected image in place, ``[1, L, D]``, built without the language model."""
    inner = loaded.model.model
    embeds = loaded.model.get_input_embeddings()(data["input_ids"])
    features = inner.get_image_features(pixel_values=data["pixel_values"], return_dict=True).pooler_output
    return embeds.masked_scatter(
        (data["input_ids"] == IMAGE).unsqueeze(-1), torch.cat(list(features)).to(embeds.dtype)
    )


def eager_row(
    layer: torch.nn.Module, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Last row of a plain softmax attention of one decoder layer, ``[H, L]``."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query.float() @ key.float().transpose(-1, -2)) * attention.scaling
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~causal, float("-inf")).softmax(-1)[0, :, -1]


@torch.no_grad()
def reference(
    loaded: LoadedModel, data: dict[str, torch.Tensor], rule: Rule, layer: int, renumber: bool
) -> list[int]:
    """Greedy decoding with every layer, cache and position handled by hand: one sample, no padding.

    ``rule(visual hidden, visual places, attention row of the layer before)`` returns the kept places.
    """
    language, head = loaded.model.model.language_model, loaded.model.lm_head
    hidden = embeddings(loaded, data)
    length = hidden.shape[1]
    positions = torch.arange(length).unsqueeze(0)
    places = (data["input_ids"][0] == IMAGE).nonzero().squeeze(-1)
    cache = DynamicCache(config=language.config)
    shift = 0

    def cut(row: torch.Tensor | None) -> None:
        nonlocal hidden, positions, shift
        kept = set(rule(hidden[0, places], places, row).tolist())
        index = torch.tensor(
            [place for place in range(length) if place in kept or place not in set(places.tolist())]
        )
        hidden = hidden[:, index]
        if renumber:
            positions = torch.arange(len(index)).unsqueeze(0)
            shift = length - len(index)
        else:
            positions = positions[:, index]

    if layer == -1:
        cut(None)
    row = None
    for number, block in enumerate(language.layers):
        if number == layer:
            cut(row)
        rotary = language.rotary_emb(hidden, position_ids=positions)
        if number == layer - 1:
            row = eager_row(block, hidden, rotary)
        hidden = block(
            hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache, use_cache=True
        )
    tokens = [int(head(language.norm(hidden[:, -1:])).argmax(-1))]
    for step in range(NEW - 1):
        hidden = loaded.model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        for number, block in enumerate(language.layers):
            moved = shift if number >= layer else 0
            rotary = language.rotary_emb(hidden, position_ids=torch.tensor([[length + step - moved]]))
            hidden = block(
                hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache, use_cache=True
            )
        tokens.append(int(head(language.norm(hidden)).argmax(-1)))
    return tokens


CASES = {
    "divprune": ({"keep_ratio": 0.25}, plain_divprune(0.25), -1, True),
    "fastv": ({"keep_ratio": 0.375, "layer": 2}, plain_fastv(0.375), 2, False),
}


def generate(applied: zoo.Applied, data: dict[str, torch.Tensor]) -> torch.Tensor:
    return applied.generate(**data, max_new_tokens=NEW, do_sample=False)[:, data["input_ids"].shape[1] :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("slug", CASES)
def test_generate_equals_the_reference(slug: str, text: str, dtype: torch.dtype) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = build(dtype, text)
    data = inputs(1, dtype)
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        tokens = generate(applied, data)[0].tolist()
    assert tokens == reference(loaded, data, rule, layer, renumber)


@pytest.mark.parametrize("slug", CASES)
def test_a_padded_batch_equals_the_references(slug: str) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = build()
    data = inputs(3)
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        tokens = generate(applied, data)
    for sample in range(3):
        assert tokens[sample].tolist() == reference(loaded, single(data, sample), rule, layer, renumber)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("slug", CASES)
def test_every_attention_implementation_gives_the_same(slug: str, implementation: str) -> None:
    parameters, rule, layer, renumber = CASES[slug]
    loaded = build()
    loaded.model.set_attn_implementation(implementation)
    data = inputs(3)
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        tokens = generate(applied, data)
    assert loaded.model.config.text_config._attn_implementation == implementation
    loaded.model.set_attn_implementation("sdpa")  # the reference relies on a kernel that is causal by itself
    for sample in range(3):
        assert tokens[sample].tolist() == reference(loaded, single(data, sample), rule, layer, renumber)


@pytest.mark.parametrize("slug", CASES)
def test_cache_lengths_and_layer_inputs_are_those_of_the_report(slug: str) -> None:
    parameters, _, layer, _ = CASES[slug]
    loaded = build()
    data = inputs(2)
    lengths: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        for block in loaded.model.model.language_model.layers
    ]
    with zoo.method(slug, **parameters).apply(loaded) as applied:
        output = applied(**data, use_cache=True)
        report = applied.report
    for hook in hooks:
        hook.remove()
    text = data["input_ids"].shape[1] - PATCHES
    cached = [entry.get_seq_length() for entry in output.past_key_values.layers]
    shown = [bar.kept for bar in report.bars["visual tokens"]]
    assert cached == [text + kept for kept in shown]
    # The pre-hook sees what reaches the layer: at the pruning layer itself our hook, which came first, has cut it.
    assert lengths == [text + kept for kept in shown] or lengths[layer + 1 :] == [
        text + k for k in shown[layer + 1 :]
    ]
    assert report.kept == pytest.approx(sum(shown) / len(shown))
    assert output.logits.shape[1] == cached[-1]


def test_an_eager_row_equals_the_probed_one() -> None:
    loaded = build(spread=0.1)
    data = single(inputs(2), 1)
    language = loaded.model.model.language_model
    seen = []
    detach = tap_attention(language.layers[1].self_attn, seen.append)
    with torch.no_grad():
        loaded.model(**data)
    detach()
    eager = build(spread=0.1)
    eager.model.set_attn_implementation("eager")
    with torch.no_grad():
        full = eager.model(**data, output_attentions=True).attentions[1]
    rows = torch.arange(full.shape[-1])
    assert (seen[0].rows(0, rows) - full[0]).abs().max() < 1e-5


def test_a_probed_row_of_a_padded_batch_equals_eager() -> None:
    loaded = build(spread=0.1)
    data = inputs(3)
    seen = []
    detach = tap_attention(loaded.model.model.language_model.layers[2].self_attn, seen.append)
    with torch.no_grad():
        loaded.model(**data)
    detach()
    eager = build(spread=0.1)
    eager.model.set_attn_implementation("eager")
    with torch.no_grad():
        full = eager.model(**data, output_attentions=True).attentions[2]
    last = torch.tensor([full.shape[-1] - 1])
    for sample in range(3):
        assert (seen[0].rows(sample, last) - full[sample, :, -1:]).abs().max() < 1e-5


@pytest.mark.parametrize("slug", CASES)
def test_everything_is_undone_also_after_an_error(slug: str) -> None:
    loaded = build()
    data = inputs(2)
    with torch.no_grad():
        loaded.model(**data)  # transformers adds hooks of its own on first use
    hooks = {
        name: len(module._forward_pre_hooks) + len(module._forward_hooks)
        for name, module in loaded.model.named_modules()
    }
    configs = [block.self_attn.config for block in loaded.model.model.language_model.layers]
    with torch.no_grad():
        before = loaded.model(**data).logits
        with pytest.raises(IndexError), zoo.method(slug, keep_ratio=0.5).apply(loaded) as applied:
            applied(**{**data, "input_ids": data["input_ids"] + 1000})
        after = loaded.model(**data).logits
    assert torch.equal(before, after)
    assert all(
        block.self_attn.config is config
        for block, config in zip(loaded.model.model.language_model.layers, configs, strict=True)
    )
    assert hooks == {
        name: len(module._forward_pre_hooks) + len(module._forward_hooks)
        for name, module in loaded.model.named_modules()
    }


@pytest.mark.parametrize("slug", CASES)
def test_keeping_everything_is_bit_equal(slug: str) -> None:
    loaded = build()
    data = inputs(2)
    with torch.no_grad():
        before = loaded.model(**data).logits
        with zoo.method(slug, keep_ratio=1).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, before)
            assert applied.report.kept_ratio == 1
        with zoo.method(slug, keep_tokens=PATCHES).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, before)


@pytest.mark.parametrize("slug", CASES)
def test_two_inputs_in_a_row_do_not_leak(slug: str) -> None:
    parameters = CASES[slug][0]
    loaded = build()
    first, second = inputs(1, seed=1), inputs(3, seed=2)
    method = zoo.method(slug, **parameters)
    with method.apply(loaded) as applied:
        alone = generate(applied, second)
    with method.apply(loaded) as applied:
        generate(applied, first)
        assert torch.equal(generate(applied, second), alone)


def test_interleaved_generations_do_not_mix() -> None:
    """The state of an input belongs to its cache: decode steps of two inputs may alternate."""
    loaded = build()
    data = [single(inputs(2, seed=3), sample) for sample in range(2)]
    with torch.no_grad(), zoo.method("fastv", keep_ratio=0.25).apply(loaded) as applied:
        straight = [generate(applied, one)[0].tolist() for one in data]
        states = [applied(**one, use_cache=True) for one in data]
        tokens = [[int(state.logits[0, -1].argmax())] for state in states]
        for _ in range(NEW - 1):
            for sample, state in enumerate(states):
                ids = torch.tensor([[tokens[sample][-1]]])
                step = applied(input_ids=ids, past_key_values=state.past_key_values, use_cache=True)
                tokens[sample].append(int(step.logits[0, -1].argmax()))
    assert tokens == straight


# --- the engine's other forms: merges, several stages, different numbers per sample ----------------------------


def run(
    loaded: LoadedModel, stages: list[Stage], data: dict[str, torch.Tensor], positions: str
) -> torch.Tensor:
    reducer = TokenReducer(loaded.anatomy, stages, positions, "test")
    try:
        return loaded.model.generate(**data, max_new_tokens=NEW, do_sample=False)[
            :, data["input_ids"].shape[1] :
        ]
    finally:
        reducer.close()


def first_by_sum(view: View) -> Keep:
    """Keeps a number of tokens that depends on the sample."""
    count = 2 + len(view.text) % 5
    return Keep(view.tokens.float().sum(-1).topk(count).indices.sort().values.unsqueeze(0))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("layers", [(-1,), (2,), (-1, 2), (1, 3), (0,)], ids=str)
def test_samples_may_keep_different_numbers_at_several_stages(
    layers: tuple[int, ...], positions: str
) -> None:
    loaded = build()
    data = inputs(3)
    stages = [Stage(layer, first_by_sum) for layer in layers]
    together = run(loaded, stages, data, positions)
    for sample in range(3):
        alone = run(loaded, stages, single(data, sample), positions)
        assert together[sample].tolist() == alone[0].tolist()


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equal_prompts_may_keep_different_numbers(implementation: str, layer: int, positions: str) -> None:
    """Without padding in the input there is no mask to cut: the engine must make one, at every step."""
    loaded = build()
    loaded.model.set_attn_implementation(implementation)
    row = single(inputs(1), 0)
    data = {
        "input_ids": row["input_ids"].repeat(3, 1),
        "attention_mask": row["attention_mask"].repeat(3, 1),
        "pixel_values": inputs(3)["pixel_values"],
    }

    def by_content(view: View) -> Keep:
        count = 3 + int(view.tokens.float().abs().sum() * 10) % 5
        return Keep(view.tokens.float().sum(-1).topk(count).indices.sort().values.unsqueeze(0))

    together = run(loaded, [Stage(layer, by_content)], data, positions)
    for sample in range(3):
        alone = run(loaded, [Stage(layer, by_content)], single(data, sample), positions)
        assert together[sample].tolist() == alone[0].tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("layers", [(-1,), (2,), (1, 3), (-1, 2)], ids=str)
def test_attention_is_causal_in_the_order_that_a_stage_makes(
    layers: tuple[int, ...], positions: str, implementation: str
) -> None:
    """Padding brings a mask that was made for the old order; a sample alone has none."""
    loaded = build()
    data = inputs(3)

    def turned(view: View) -> Keep:
        best = view.tokens.float().sum(-1).topk(8 + len(view.text) % 3).indices
        return Keep(best.sort(descending=True).values.unsqueeze(0))

    stages = [Stage(layers[0], turned), *(Stage(layer, first_by_sum) for layer in layers[1:])]
    loaded.model.set_attn_implementation(implementation)
    together = run(loaded, stages, data, positions)
    loaded.model.set_attn_implementation("sdpa")
    for sample in range(3):
        alone = run(loaded, stages, single(data, sample), positions)
        assert together[sample].tolist() == alone[0].tolist()


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("layer", [-1, 2])
def test_a_merge_equals_its_transformation_matrix(layer: int, positions: str) -> None:
    loaded = build()
    data = inputs(3)

    def matrix(view: View) -> Transform:
        number = len(view.tokens)
        rows = torch.zeros(1, number // 2, number)
        for token in range(number):
            rows[0, token // 2, token] = 0.5
        return Transform(rows, torch.arange(0, number, 2).unsqueeze(0))

    assert torch.equal(
        run(loaded, [Stage(layer, pairs)], data, positions),
        run(loaded, [Stage(layer, matrix)], data, positions),
    )


def test_a_merge_before_the_llm_equals_embeddings_built_by_hand() -> None:
    loaded = build()
    data = single(inputs(2), 1)

    embeds = embeddings(loaded, data)
    visual = (data["input_ids"][0] == IMAGE).nonzero().squeeze(-1)
    merged = embeds[0, visual].view(PATCHES // 2, 2, -1).mean(1)
    short = torch.cat((embeds[0, : visual[0]], merged, embeds[0, visual[-1] + 1 :])).unsqueeze(0)
    expected = loaded.model.generate(inputs_embeds=short, max_new_tokens=NEW, do_sample=False)
    assert run(loaded, [Stage(-1, pairs)], data, "renumber").tolist() == expected.tolist()


def test_several_decoding_positions_at_once_see_the_short_cache() -> None:
    """A verification step of a draft: several new tokens against caches of different lengths."""
    loaded = build()
    data = single(inputs(2), 1)
    new = torch.tensor([[7, 9, 11]])
    with torch.no_grad(), zoo.method("fastv", keep_ratio=0.25).apply(loaded) as applied:
        cache = applied(**data, use_cache=True).past_key_values
        one_by_one = []
        for token in new[0]:
            one_by_one.append(applied(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1])
        cache.crop(-3)
        together = applied(input_ids=new, past_key_values=cache).logits[0]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [{"layer": -1}, {"layer": 2}, {"layer": 3, "trims": 1}], ids=str)
def test_layers_with_a_sliding_window_keep_what_they_need(stage: dict[str, int]) -> None:
    """The prompt is longer than the window; what leaves is found in the caches all the same, as decoding by hand."""
    loaded = build(text="mistral")
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    decoder.config.sliding_window = 12
    data = inputs(3)

    def few(view: View) -> Keep:
        return Keep(torch.arange(0, len(view.tokens), 4).unsqueeze(0))

    stages = [Stage(reduce=few, **stage)]
    together = run(loaded, stages, data, "keep")
    reducer = TokenReducer(loaded.anatomy, stages, "keep", "test")
    with torch.no_grad():
        cache = loaded.model(**data, use_cache=True).past_key_values
    reducer.close()
    lengths = [layer.get_seq_length() for layer in cache.layers]
    short = data["input_ids"].shape[1] - PATCHES + PATCHES // 4
    assert lengths[-1] == short
    assert lengths[1] == (short if stage["layer"] < 1 or "trims" in stage else data["input_ids"].shape[1])
    for sample in range(3):
        assert together[sample].tolist() == run(loaded, stages, single(data, sample), "keep")[0].tolist()
    everything = [Stage(2, lambda view: Keep(torch.arange(len(view.tokens)).unsqueeze(0)))]
    dense = loaded.model.generate(**data, max_new_tokens=NEW, do_sample=False)
    assert run(loaded, everything, data, "keep").tolist() == dense[:, data["input_ids"].shape[1] :].tolist()
    # A window as wide as everything gives what full attention gives.
    decoder.config.sliding_window = 64
    wide = run(loaded, stages, data, "keep")
    decoder.config.sliding_window = None
    assert wide.tolist() == run(loaded, stages, data, "keep").tolist()


# --- refusals --------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line() -> None:
    loaded = build()
    data = inputs(1)
    text_only = {"input_ids": torch.tensor([[5, 6, 7]])}
    with zoo.method("divprune").apply(loaded) as applied:
        with pytest.raises(BadInput, match="nothing to report"):
            _ = applied.report
        with pytest.raises(BadInput, match="no image"):
            applied.generate(**text_only, max_new_tokens=2)
        with pytest.raises(Refused, match="beam"):
            applied.generate(**data, num_beams=2, max_new_tokens=2)
        with pytest.raises(Refused, match="dynamic cache"):
            applied.generate(**data, cache_implementation="static", max_new_tokens=2)
    with (
        zoo.method("divprune", keep_tokens=99).apply(loaded) as applied,
        pytest.raises(BadInput, match="only 16"),
    ):
        applied.generate(**data, max_new_tokens=2)
    with pytest.raises(Refused, match="4 layers"):
        zoo.method("fastv", layer=9).apply(loaded)
    with pytest.raises(BadInput, match="did you mean keep_ratio"):
        zoo.method("fastv", keep_ration=0.5)
    with pytest.raises(BadInput, match="nothing to save"), zoo.method("fastv").apply(loaded) as applied:
        applied.save("somewhere")


def test_a_cache_filled_before_is_refused() -> None:
    loaded = build()
    data = inputs(1)
    cache = loaded.model(**data, use_cache=True).past_key_values
    method = zoo.method("fastv", keep_ratio=0.25)
    assert isinstance(method, Method)
    with method.apply(loaded) as applied, pytest.raises(BadInput, match="before the method was applied"):
        applied(input_ids=torch.tensor([[5]]), past_key_values=cache)
