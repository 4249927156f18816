"""Encoder methods on tiny encoders of every architecture: what a user relies on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from encoders import DEPTH, ENCODERS, PREFIX, features, footprint, lengths, pixels, tiny
from torch.testing import assert_close

import zoo
from zoo.errors import BadInput, BadParameter, Refused
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 4}),
    ("tome", {"r": (0, 5, 9), "proportional_attention": False}),
    ("evit", {"layers": (1, 2), "keep_ratio": 0.6}),
    ("evit", {"layers": (0, 2), "fuse": False, "tokens": (20, 7)}),
    ("pitome", {"keep_ratio": 0.85}),
    ("zero-tprune", {"layers": (0, 2), "retention": (0.9, 0.7), "iterations": (9, 1), "duplicates": 3}),
    ("gtp-vit", {"propagated": 5}),
    ("token-transforming", {"layers": (1, 2), "keep_ratio": 0.6}),
]
IDS = ["tome", "tome-list", "evit", "evit-drop", "pitome", "zero-tprune", "gtp-vit", "token-transforming"]
WHOLE = [case for case in METHODS if case[0] not in ("gtp-vit", "token-transforming")]
"""Those that never share a patch out among several tokens."""
IDENTITIES: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 0}),
    ("evit", {"layers": (1, 2), "keep_ratio": 1}),
    ("evit", {"layers": (1, 2), "tokens": (1000, 1000)}),
    ("pitome", {"keep_ratio": 1}),
    ("zero-tprune", {"layers": (1,), "retention": (1,), "iterations": (5,), "duplicates": 0}),
    ("gtp-vit", {"propagated": 0}),
    ("token-transforming", {"layers": (1,), "keep_ratio": 1}),
    ("token-transforming", {"layers": (1, 2), "tokens": (1000, 1000)}),
]

both = pytest.mark.parametrize(("slug", "options"), METHODS, ids=IDS)
every = pytest.mark.parametrize("kind", ENCODERS)


def expected_lengths(slug: str, options: dict[str, Any], patches: int, prefix: int) -> list[int]:
    """Tokens entering each block and leaving the last one, from the papers' rules."""
    counts, n = [], patches
    for block in range(DEPTH):
        counts.append(n + prefix)
        if slug == "tome":
            r = options["r"] if isinstance(options["r"], int) else [*options["r"], 0, 0][block]
            n -= min(r, n // 2)
        elif slug == "pitome":
            n -= math.floor(n - n * options["keep_ratio"])
        elif slug == "gtp-vit":
            n -= options["propagated"]
        elif slug == "zero-tprune" and block in options["layers"]:
            n -= options["duplicates"]
            n = math.ceil(options["retention"][options["layers"].index(block)] * n)
        elif slug == "token-transforming" and block in options["layers"]:
            n = math.ceil(options["keep_ratio"] * n)
        elif slug == "evit" and block in options["layers"]:
            given = options.get("tokens")
            k = given[options["layers"].index(block)] if given else math.ceil(options["keep_ratio"] * n)
            n = k + options.get("fuse", True) if k < n else n
    return [*counts, n + prefix]


@both
@every
@pytest.mark.parametrize("size", [48, 40])
def test_every_later_block_is_really_shorter(
    slug: str, options: dict[str, Any], kind: str, size: int
) -> None:
    """36 and 25 patches: even and odd sequence lengths, whatever the prefix."""
    loaded = tiny(kind, image_size=size)
    with zoo.method(slug, **options).apply(loaded) as applied:
        with lengths(loaded) as seen:
            out = features(loaded.model, pixels(3, size))
        report = applied.report
    expected = expected_lengths(slug, options, (size // 8) ** 2, PREFIX[kind])
    assert seen["attention"] == expected[:-1]
    # Zero-TPrune acts behind a block, the others between its halves.
    assert seen["mlp"] == (expected[:-1] if slug == "zero-tprune" else expected[1:])
    assert out.shape[1] == expected[-1] == report.facts["tokens left at the end"]
    assert [bar.kept for bar in report.bars["tokens per block"]] == expected[:-1]
    assert report.total == expected[0]
    assert report.kept == pytest.approx(sum(expected[:-1]) / DEPTH)


@both
@every
def test_leaving_restores_the_model(slug: str, options: dict[str, Any], kind: str) -> None:
    loaded = tiny(kind)
    dense = features(loaded.model, pixels())
    before = footprint(loaded.model)
    with zoo.method(slug, **options).apply(loaded):
        assert features(loaded.model, pixels()).shape != dense.shape
    assert footprint(loaded.model) == before
    assert torch.equal(features(loaded.model, pixels()), dense)


@both
@every
def test_a_batch_equals_single_images(slug: str, options: dict[str, Any], kind: str) -> None:
    loaded = tiny(kind)
    x = pixels(3)
    with zoo.method(slug, **options).apply(loaded):
        together = features(loaded.model, x)
        for sample in range(3):
            alone = features(loaded.model, x[sample : sample + 1])
            assert_close(together[sample : sample + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("slug", "options"), IDENTITIES)
@every
def test_removing_nothing_is_bit_equal(slug: str, options: dict[str, Any], kind: str) -> None:
    loaded = tiny(kind)
    dense = features(loaded.model, pixels())
    with zoo.method(slug, **options).apply(loaded) as applied:
        assert torch.equal(features(loaded.model, pixels()), dense)
    assert applied.report.kept_ratio == 1


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(slug: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    loaded = tiny("dinov2-registers")
    with zoo.method(slug, **options).apply(loaded):
        exact = features(loaded.model, pixels())
        loaded.model.to(dtype)
        rough = features(loaded.model, pixels().to(dtype))
    assert rough.dtype == dtype
    assert rough.shape == exact.shape
    assert rough.isfinite().all()
    prefix = torch.cosine_similarity(rough[:, :5].float(), exact[:, :5], dim=-1)
    assert float(prefix.min()) > 0.9


@both
@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_eager_and_sdpa_agree(slug: str, options: dict[str, Any], kind: str) -> None:
    outputs = []
    for attention in ("sdpa", "eager"):
        loaded = tiny(kind, attention=attention)
        with zoo.method(slug, **options).apply(loaded):
            outputs.append(features(loaded.model, pixels()))
    assert_close(*outputs, rtol=1e-4, atol=1e-4)


@both
@every
def test_training_works(slug: str, options: dict[str, Any], kind: str) -> None:
    """Gradients reach every parameter that gets one without the method."""
    loaded = tiny(kind)
    loaded.model.train()

    def trained() -> set[str]:
        loaded.model.zero_grad()
        out = loaded.model(pixel_values=pixels(), output_hidden_states=True)
        out.hidden_states[-1].square().sum().backward()
        grads = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
        assert all(grad.isfinite().all() for grad in grads.values())
        return {name for name, grad in grads.items() if bool(grad.any())}

    dense = trained()
    with zoo.method(slug, **options).apply(loaded):
        assert trained() == dense


@both
def test_inputs_do_not_leak_into_each_other(slug: str, options: dict[str, Any]) -> None:
    loaded = tiny("deit")
    method = zoo.method(slug, **options)
    with method.apply(loaded) as applied:
        first = features(loaded.model, pixels(seed=1))
        sources = applied.sources
        features(loaded.model, pixels(3, seed=2))
        assert applied.sources.shape[0] == 3
        assert torch.equal(features(loaded.model, pixels(seed=1)), first)
        assert torch.equal(applied.sources, sources)


@pytest.mark.parametrize(("slug", "options"), WHOLE, ids=[slug for slug, _ in WHOLE])
@every
def test_sources_account_for_every_token(slug: str, options: dict[str, Any], kind: str) -> None:
    loaded = tiny(kind)
    with zoo.method(slug, **options).apply(loaded) as applied:
        out = features(loaded.model, pixels())
    sources, prefix = applied.sources, PREFIX[kind]
    assert sources.shape == (2, out.shape[1], 36 + prefix)
    received = sources.sum(1)
    dropping = options.get("fuse") is False or slug == "zero-tprune"
    assert bool((received <= 1).all()) if dropping else bool((received == 1).all())
    assert int(received[0].sum()) == (out.shape[1] if dropping else 36 + prefix)
    # Prefix tokens are themselves and nothing else.
    assert torch.equal(sources[:, :prefix], torch.eye(36 + prefix)[:prefix].expand(2, -1, -1))
    back = applied.unmerge(out)
    held = sources.argmax(1)
    for position in range(36 + prefix):
        for sample in range(2):
            expected = out[sample, held[sample, position]] * received[sample, position]
            assert torch.equal(back[sample, position], expected)
    with pytest.raises(BadInput, match="unmerge takes"):
        applied.unmerge(out[:, :-1])


@every
def test_restore_gives_the_full_length(kind: str) -> None:
    loaded = tiny(kind)
    short = zoo.method("tome", r=6).apply(loaded)
    out = features(loaded.model, pixels())
    expected = short.unmerge(out)
    short.close()
    with zoo.method("tome", r=6, restore=True).apply(loaded) as applied:
        assert torch.equal(features(loaded.model, pixels()), expected)
    assert applied.report.facts["tokens left at the end"] == out.shape[1]


def test_tome_equals_duplicating_merged_tokens() -> None:
    """Proportional attention with size s is attention over s copies: merging equal tokens changes nothing."""
    loaded = tiny("vit")
    x = pixels(2)
    tile = x[:, :, :8, :8]
    embeddings = loaded.model.vit.embeddings
    # All patches look alike and have no position: every merged pair consists of equal tokens.
    embeddings.position_embeddings.data.zero_()
    same = tile.repeat(1, 1, 6, 6)
    dense = features(loaded.model, same)
    with zoo.method("tome", r=9).apply(loaded):
        proportional = features(loaded.model, same)
    with zoo.method("tome", r=9, proportional_attention=False).apply(loaded):
        plain = features(loaded.model, same)
    assert_close(proportional[:, 0], dense[:, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[:, 0], dense[:, 0], atol=1e-3)


def test_evit_ranks_by_received_attention_without_cls() -> None:
    loaded = tiny("siglip")
    method = zoo.method("evit", layers=(1,), keep_ratio=0.5, fuse=False)
    with method.apply(loaded) as applied:
        features(loaded.model, pixels())
    with torch.no_grad():
        eager = tiny("siglip", attention="eager").model(pixels(), output_attentions=True)
    best = eager.attentions[1].mean((1, 2)).topk(18).indices
    assert torch.equal(applied.sources.argmax(-1), best)
    assert "variant" in str(applied.report.facts["ranked by"])


def test_evit_equals_eager_selection() -> None:
    """Tokens and their order come from the [CLS] row of eager attention; registers are not candidates."""
    loaded = tiny("dinov2-registers")
    with zoo.method("evit", layers=(2,), keep_ratio=0.5, fuse=False).apply(loaded) as applied:
        features(loaded.model, pixels())
    with torch.no_grad():
        eager = tiny("dinov2-registers", attention="eager").model(pixels(), output_attentions=True)
    best = eager.attentions[2][:, :, 0, 5:].mean(1).topk(18).indices + 5
    assert torch.equal(applied.sources[:, 5:].argmax(-1), best)


def test_hidden_states_are_recorded_at_their_real_length() -> None:
    loaded = tiny("vit")
    with zoo.method("tome", r=4).apply(loaded), torch.no_grad():
        out = loaded.model(pixel_values=pixels(), output_hidden_states=True)
    assert [state.shape[1] for state in out.hidden_states] == [37, 33, 29, 25, 21]
    assert out.logits.shape == (2, 10)


def test_refusals() -> None:
    llama = LoadedModel(*tiny_model("tiny-llama"))
    with pytest.raises(Refused, match="vision encoder"):
        zoo.method("tome").apply(llama)
    with pytest.raises(Refused, match="only 4 blocks"):
        zoo.method("evit").apply(tiny("vit"))
    with pytest.raises(BadParameter, match="at most 4"):
        zoo.method("tome", r=(1,) * 5).apply(tiny("vit"))
    for wrong in (
        {"layers": (1, 1)},
        {"layers": (1,), "tokens": (3, 4)},
        {"keep_ratio": 0},
        {"tokens": (0,) * 3},
    ):
        with pytest.raises(BadParameter):
            zoo.method("evit", **wrong)
    for wrong in ({"r": -1}, {"r": (3, -1)}, {"inflection": 2}):
        with pytest.raises(BadParameter):
            zoo.method("tome", **wrong)
    loaded = tiny("vit")
    with zoo.method("tome", r=4).apply(loaded) as applied:
        with pytest.raises(BadInput, match="no input has run"):
            _ = applied.report
        with pytest.raises(Refused, match="close the method"):
            zoo.method("evit", layers=(1,)).apply(loaded)
    with pytest.raises(BadInput, match="nothing to save"):
        applied.save("/tmp/nowhere")


def test_more_merges_than_patches_stop_at_the_prefix() -> None:
    loaded = tiny("dinov2-registers")
    with zoo.method("tome", r=1000).apply(loaded) as applied:
        features(loaded.model, pixels())
    assert applied.tokens_per_block == [41, 23, 14, 10]
    assert applied.report.facts["tokens left at the end"] == 8


def test_an_encoder_that_packs_all_pictures_into_one_sequence_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = tiny("vit")
    anatomy = loaded.anatomy
    assert anatomy.encoder is not None
    packed = replace(anatomy, encoder=replace(anatomy.encoder, packed_order=lambda grids: grids))
    monkeypatch.setattr(LoadedModel, "anatomy", packed)
    with pytest.raises(Refused, match="one sequence per picture"):
        zoo.method("tome").apply(loaded)
