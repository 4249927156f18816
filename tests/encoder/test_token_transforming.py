"""Token Transforming: what its matrix must be, and where it ends."""

from __future__ import annotations

import math

import pytest
import torch
from encoders import PREFIX, features, pixels, tiny
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

import zoo
from zoo.engines.reductions import Blend
from zoo.errors import BadParameter, Refused
from zoo.methods.encoder_tokens.token_transforming import TokenTransforming


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep_anchor", [True, False])
@pytest.mark.parametrize("nearest", [None, 2])
def test_shares_equal_the_loop(keep_anchor: bool, nearest: int | None) -> None:
    key, anchors = rand(1, 7, 5), torch.tensor([[1, 4, 6]])
    found = TokenTransforming(keep_anchor=keep_anchor, nearest=nearest, temperature=0.3).shares(key, anchors)
    for patch in range(7):
        likeness = [float(cosine_similarity(key[0, anchor], key[0, patch], dim=0)) for anchor in anchors[0]]
        lowest = sorted(likeness)[-nearest] if nearest else -2
        raw = [math.exp(value / 0.3) if value >= lowest else 0.0 for value in likeness]
        expected = [value / sum(raw) for value in raw]
        if keep_anchor and patch in (1, 4, 6):
            expected = [float(patch == anchor) for anchor in (1, 4, 6)]
        assert_close(found[0, :, patch], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_one_nearest_anchor_is_merging() -> None:
    """So is a temperature next to zero."""
    key, anchors = rand(2, 12, 6), torch.tensor([[0, 3, 7], [2, 5, 11]])
    hard = TokenTransforming(nearest=1).shares(key, anchors)
    assert torch.equal(hard, hard.round())
    assert_close(TokenTransforming(temperature=1e-4).shares(key, anchors), hard)


def test_rows_are_means_weighted_with_sizes() -> None:
    share = rand(2, 3, 8).abs()
    share = share / share.sum(1, keepdim=True)
    weight = rand(2, 8, seed=1).abs() + 0.5
    blend = Blend(share, torch.arange(3).expand(2, -1), weight)
    x = rand(2, 8, 4, seed=2)
    total = (share * weight.unsqueeze(1)).sum(-1)
    assert_close(blend.sizes(), total)
    assert_close(blend.sizes().sum(1), weight.sum(1))
    expected = torch.einsum("bkn,bn,bnd->bkd", share, weight, x) / total.unsqueeze(-1)
    assert_close(blend.apply(x), expected)
    assert_close(blend.apply(torch.full((2, 8, 1), 7.0)), torch.full((2, 3, 1), 7.0))


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov2-registers"])
def test_every_patch_is_shared_out_in_full(kind: str) -> None:
    """Also over several blocks; prefix tokens are themselves, and a constant stays constant both ways."""
    loaded, prefix = tiny(kind), PREFIX[kind]
    with zoo.method("token-transforming", layers=(1, 2), keep_ratio=0.5).apply(loaded) as applied:
        out = features(loaded.model, pixels())
    sources = applied.sources
    assert_close(sources.sum(1), torch.ones(2, 36 + prefix))
    assert_close(sources[:, :prefix], torch.eye(36 + prefix)[:prefix].expand(2, -1, -1))
    assert bool((sources[:, prefix:, prefix:] > 0).sum(1).gt(1).any())
    back = applied.unmerge(torch.ones_like(out))
    assert_close(back, torch.ones_like(back))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_anchors_have_most_attention_and_keep_their_order(kind: str) -> None:
    loaded, prefix = tiny(kind), PREFIX[kind]
    with zoo.method("token-transforming", layers=(1,), tokens=(9,)).apply(loaded) as applied:
        features(loaded.model, pixels())
    with torch.no_grad():
        eager = tiny(kind, attention="eager").model(pixels(), output_attentions=True).attentions[1]
    score = eager[:, :, 0].mean(1) if prefix else eager.mean((1, 2))
    best = score[:, prefix:].topk(9).indices.sort(1).values + prefix
    # An anchor goes to itself alone.
    alone = (applied.sources == 1).any(1)
    for sample in range(2):
        assert alone[sample].nonzero().flatten().tolist() == [*range(prefix), *best[sample].tolist()]
    assert (applied.report.facts["anchors ranked by"] == "[CLS] attention") == bool(prefix)


def test_later_attention_counts_sizes() -> None:
    """The bias of the next block is the log of what each token stands for."""
    loaded = tiny("vit")
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    masks: list[torch.Tensor] = []
    hook = encoder.blocks[2].attention.module.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with zoo.method("token-transforming", layers=(1,)).apply(loaded) as applied:
        features(loaded.model, pixels())
    hook.remove()
    assert_close(masks[0][:, 0, 0], applied.sources.sum(-1).log(), rtol=1e-4, atol=1e-5)


def test_a_batch_with_hidden_patches_has_no_holes() -> None:
    """More anchors than visible patches: hidden ones fill up, unseen, and nothing becomes NaN."""
    loaded = tiny("vit")
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, 10:] = 0
    method = zoo.method("token-transforming", layers=(1,), tokens=(20,))
    with method.apply(loaded) as applied, torch.no_grad():
        both = loaded.model(pixel_values=pixels(), attention_mask=mask).logits
        second = loaded.model(pixel_values=pixels()[1:]).logits
    assert bool(both.isfinite().all())
    assert_close(both[1:], second, rtol=1e-4, atol=1e-5)
    assert applied.reducer.left == 21


def test_refusals() -> None:
    with pytest.raises(Refused, match="only 4 blocks"):
        zoo.method("token-transforming").apply(tiny("vit"))
    for wrong in ({"layers": (1, 1)}, {"layers": (1,), "tokens": (3, 4)}, {"temperature": 0}):
        with pytest.raises(BadParameter):
            zoo.method("token-transforming", **wrong)
