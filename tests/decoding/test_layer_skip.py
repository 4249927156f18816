"""Self-speculation: what the reduced model drafts, what is left of it, and the search for what to skip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import PAD, build, left_padded, plain, prompts
from test_speculative_sampling import SMALL, chi_square, ids_of_small, many, pair_law

import zoo
from zoo.engines.self_drafting import halves, skipping
from zoo.engines.surgery import Block
from zoo.errors import BadParameter, Refused
from zoo.families.decoding import AppliedDecoder
from zoo.methods.decoding._swift import OnlineSearch, SearchSettings
from zoo.methods.decoding.layer_skip_self_speculation import LayerSkipSelfSpeculation
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

SLUG = "layer-skip-self-speculation"
VARIANTS: dict[str, dict[str, Any]] = {
    "draft-and-verify": {"threshold": 0.02},
    "swift": {"threshold": 0.02, "context_window": 6, "bayes_interval": 3},
    "layer-skip": {"exit_layer": 3},
}
NEW = 40


def model(**changes: Any) -> LoadedModel:
    """Six layers of which each adds little, so that a part of them is a fair guess."""
    return build(num_hidden_layers=6, **({"initializer_range": 0.07} | changes))


def apply(loaded: LoadedModel, variant: str, **options: Any) -> AppliedDecoder:
    return zoo.method(SLUG, variant=variant, **(VARIANTS[variant] | options)).apply(loaded)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_greedy_output_is_that_of_generate(variant: str, kind: str) -> None:
    loaded = model(kind=kind)
    applied = apply(loaded, variant)
    for seed in (1, 2):
        ids = prompts(1, 14, seed)
        out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(out, plain(loaded, ids, max_new_tokens=NEW))
        stats = applied.report.decoding
        assert stats is not None
        assert 0 < sum(stats.accepted) < sum(stats.drafted)


def test_a_padded_batch_gives_what_single_prompts_give(variant: str) -> None:
    loaded = model()
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((9, 25, 14))]
    ids, mask = left_padded(rows)
    applied = apply(loaded, variant)
    out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for row, line in zip(rows, out, strict=True):
        assert torch.equal(line[ids.shape[1] :], plain(loaded, row[None], max_new_tokens=NEW)[0, len(row) :])
    stats = applied.report.decoding
    assert stats is not None
    assert sum(stats.accepted) > 0


@pytest.mark.parametrize("place", [3, 17, 30])
def test_end_of_sequence_inside_a_draft(variant: str, place: int) -> None:
    loaded = model()
    options = {"max_new_tokens": NEW, "pad_token_id": PAD}
    options["eos_token_id"] = int(plain(loaded, prompts(), max_new_tokens=NEW)[0, 14 + place])
    out = apply(loaded, variant).generate(input_ids=prompts(), do_sample=False, **options)
    assert torch.equal(out, plain(loaded, prompts(), **options))


def test_repetition_penalty_and_bfloat16(variant: str) -> None:
    loaded = model()
    options: dict[str, Any] = {"max_new_tokens": 20, "repetition_penalty": 1.3}
    out = apply(loaded, variant).generate(input_ids=prompts(), do_sample=False, **options)
    assert torch.equal(out, plain(loaded, prompts(), **options))
    half = model(dtype=torch.bfloat16)
    out = apply(half, variant).generate(input_ids=prompts(), do_sample=False, max_new_tokens=20)
    assert out.shape == (1, 34)


def test_drafts_are_what_the_reduced_model_writes(variant: str) -> None:
    """On what the whole model read of the text before, in one pass, without batch and padding."""
    loaded = model()
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((9, 14))]
    ids, mask = left_padded(rows)
    applied = apply(loaded, variant)
    written = []
    drafter: Any = applied.drafter
    inner = drafter.draft

    def watch(row: Any, tokens: list[int]) -> Any:
        written.append((list(row.tokens), list(tokens), drafter.skipped))
        return inner(row, tokens)

    drafter.draft = watch
    applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    assert len(written) > 10
    for tokens, draft, skipped in written[::3]:
        with torch.no_grad():
            cache = loaded.model(input_ids=torch.tensor([tokens[:-1]]), use_cache=True).past_key_values
            with skipping(decoder, skipped):
                fresh = torch.tensor([tokens[-1:] + draft[:-1]])
                logits = loaded.model(input_ids=fresh, past_key_values=cache).logits[0]
        assert logits.argmax(-1).tolist() == draft


def test_skipping_is_leaving_out() -> None:
    """Against layers written out by hand; the model is whole again afterwards."""
    loaded = model()
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    with torch.no_grad():
        before = loaded.model(input_ids=prompts()).logits
        hidden = decoder.embed(prompts())
        positions = torch.arange(14).unsqueeze(0)
        angles = decoder.rotary(hidden, positions)
        for index, layer in enumerate(decoder.layers):
            if index != 2:
                part = layer.attention.module(
                    hidden_states=layer.input_norm(hidden), position_embeddings=angles, attention_mask=None
                )[0]
                hidden = hidden + part
            if index not in (1, 2):
                hidden = hidden + layer.mlp.module(layer.post_norm(hidden))
        expected = decoder.head(decoder.norm(hidden))
        with skipping(decoder, {Block(2, "attention"), Block(2, "mlp"), Block(1, "mlp")}):
            torch.testing.assert_close(loaded.model(input_ids=prompts()).logits, expected)
        assert torch.equal(loaded.model(input_ids=prompts()).logits, before)


def test_an_exception_while_drafting_leaves_model_and_cache_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model()
    applied = apply(loaded, "layer-skip")
    drafter: Any = applied.drafter
    lengths = []

    def fail(row: Any, draft: list[int], logits: torch.Tensor) -> tuple[int, bool]:
        if len(draft) == 2:
            lengths.append([layer.get_seq_length() for layer in drafter.context.cache.layers])
            raise KeyboardInterrupt
        return int(logits.argmax()), True

    caches = []
    start = drafter.start
    monkeypatch.setattr(drafter, "choose", fail)
    monkeypatch.setattr(drafter, "start", lambda c, rows: (caches.append(c.cache), start(c, rows)))
    with pytest.raises(KeyboardInterrupt):
        applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=NEW)
    assert lengths == [[17, 17, 17, 14, 14, 14]]
    assert [layer.get_seq_length() for layer in caches[0].layers] == [14] * 6
    assert plain(loaded, prompts(), max_new_tokens=4).shape == (1, 18)


@pytest.mark.parametrize("variant", ["layer-skip", "draft-and-verify"])
def test_what_is_sampled_follows_the_law(variant: str) -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    options = {"exit_layer": 2} if variant == "layer-skip" else {}
    applied = apply(loaded, variant, draft_tokens=2, **options)
    assert chi_square(many(applied, ids_of_small(), 600), law) > 1e-3
    stats = applied.report.decoding
    assert stats is not None
    assert 0 < sum(stats.accepted) < sum(stats.drafted)


def test_swift_finds_blocks_that_do_nothing() -> None:
    loaded = model()
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    idle = {Block(2, "attention"), Block(3, "attention"), Block(4, "mlp")}
    for block in idle:
        layer = decoder.layers[block.index]
        last = layer.attention.output if block.part == "attention" else layer.mlp.down
        torch.nn.init.zeros_(last.linear.weight)
    applied = apply(loaded, "swift", context_window=12, skip_ratio=0.375)
    search = applied.drafter.search
    assert search.best == halves((1, 3))
    for seed in range(6):
        applied.generate(input_ids=prompts(1, 14, seed), do_sample=False, max_new_tokens=60)
        if not search.running:
            break
    assert search.best == idle
    assert search.best_score == 1.0


def test_the_online_search_ends() -> None:
    for settings, steps in (
        (SearchSettings(search_iterations=7), 7),
        (SearchSettings(search_patience=4), 4),
    ):
        search = OnlineSearch(8, settings)
        tried: list[Any] = []

        def useless(blocks: Any, tried: list[Any] = tried) -> float:
            tried.append(blocks)
            return 0.0

        while search.running:
            search.step(useless)
        assert len(tried) == steps
        assert all(len(blocks) == int(12 * 0.45) for blocks in tried)
        assert not {block.index for blocks in tried for block in blocks} & {0, 7}
    assert search.best == halves((1, 3, 5))


def test_guided_proposals_beat_chance() -> None:
    """After sets judged by how many good blocks they hold, the Gaussian process proposes better ones."""
    search = OnlineSearch(10, SearchSettings(bayes_interval=40, search_target=1.0))
    good = set(search.blocks[:8])
    seen: list[int] = []

    def judge(blocks: Any) -> float:
        seen.append(len(good & set(blocks)))
        return seen[-1] / 8

    for _ in range(40):
        search.step(judge)
    assert seen[39] > sum(seen[:39]) / 39 + 1


def test_fitting_finds_a_method() -> None:
    loaded = model()
    seen = []
    found = LayerSkipSelfSpeculation.fit(
        loaded,
        [{"input_ids": prompts()}],
        calls=4,
        initial=2,
        new_tokens=6,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.variant == "draft-and-verify"
    assert 0 not in (found.skip_attention or ())
    out = found.apply(loaded).generate(input_ids=prompts(), do_sample=False, max_new_tokens=10)
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=10))


def test_refusals() -> None:
    with pytest.raises(Refused, match="sliding window"):
        zoo.method(SLUG).apply(build(kind="sliding"))
    with pytest.raises(Refused, match="sliding window"):
        zoo.method(SLUG).apply(LoadedModel(*tiny_model("tiny-gemma3")))
    with pytest.raises(Refused, match="3 layers or more"):
        zoo.method(SLUG).apply(build(num_hidden_layers=2))
    with pytest.raises(Refused, match="text-only"):
        zoo.method(SLUG).apply(LoadedModel(*tiny_model("tiny-llava")))
    with pytest.raises(BadParameter, match="below the model's 3 layers"):
        zoo.method(SLUG, variant="draft-and-verify", skip_mlp=(3,)).apply(build())
    with pytest.raises(BadParameter, match="below the model's 3 layers"):
        zoo.method(SLUG, variant="layer-skip", exit_layer=3).apply(build())
    with pytest.raises(BadParameter, match="greater than or equal to 1"):
        zoo.method(SLUG, skip_attention=(0,))
