"""AS-ViT: the score against a slow reference, thresholds, and what a mask stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import features, footprint, lengths, pixels, tiny
from torch import nn

import zoo
from zoo.errors import BadParameter, Refused
from zoo.methods.encoder_tokens._as_vit_training import (
    LearningASViT,
    encoder_flops,
    masked_softmax,
    threshold_mask,
)
from zoo.methods.encoder_tokens.as_vit import ASViT, above, initial_threshold, token_score

STAGES: dict[str, Any] = {"layers": [1, 2, 3], "thresholds": [0.02, 0.022, 0.025]}


def test_the_score_is_the_formula_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 5, generator=generator).softmax(-1)
    output = torch.randn(2, 3, 5, 4, generator=generator)
    score = token_score(attention, output)
    for image in range(2):
        for token in range(5):
            norms = [float(output[image, head, token].norm()) for head in range(3)]
            expected = sum(
                float(attention[image, head, token]) * norms[head] / (sum(norms) + 1e-8) for head in range(3)
            )
            assert score[image, token] == pytest.approx(expected, rel=1e-5)


def test_one_image_keeps_what_passes_and_several_the_mean_count() -> None:
    score = torch.tensor([[0.1, 0.5, 0.3, 0.4], [0.6, 0.05, 0.01, 0.02]])
    assert above(score[:1], 0.2).tolist() == [[1, 2, 3]]
    assert above(score[1:], 0.2).tolist() == [[0]]
    assert above(score, 0.2).tolist() == [[1, 3], [0, 1]]  # (3 + 1) // 2, best first
    assert above(score[:1], 0.9).tolist() == [[1]]  # never none
    assert above(score, 0.55).shape == (2, 1)


@pytest.mark.parametrize("kind", ["vit", "deit", "clip", "dinov2", "dinov2-registers"])
def test_the_sequence_is_shorter_in_later_blocks(kind: str) -> None:
    loaded = tiny(kind)
    dense = features(loaded.model, pixels(1))
    before = footprint(loaded.model)
    with zoo.method("as-vit", **STAGES).apply(loaded) as applied, lengths(loaded) as seen:
        short = features(loaded.model, pixels(1))
        assert seen["attention"] == seen["mlp"] == applied.tokens_per_block
    assert seen["mlp"][0] == dense.shape[1] > seen["mlp"][1] >= seen["mlp"][3] == short.shape[1]
    assert footprint(loaded.model) == before
    assert torch.equal(features(loaded.model, pixels(1)), dense)


def test_zero_thresholds_change_nothing_but_the_rounding() -> None:
    loaded = tiny("vit")
    dense = features(loaded.model, pixels())
    with zoo.method("as-vit", layers=[1, 3], thresholds=[0, 0]).apply(loaded):
        torch.testing.assert_close(features(loaded.model, pixels()), dense)


def test_untrained_thresholds_follow_the_number_of_patches() -> None:
    assert [initial_threshold(stage, 196) for stage in range(3)] == pytest.approx([0.001, 0.002, 0.003])
    loaded = tiny("vit")
    method = zoo.method("as-vit", layers=[1])
    with method.apply(loaded) as applied:
        features(loaded.model, pixels(1))
        assert applied.report.facts["threshold before block 1"] == initial_threshold(0, 36)


def test_trained_thresholds_are_found_in_the_configuration() -> None:
    loaded = tiny("vit")
    loaded.model.config.as_vit = {"layers": [2], "thresholds": [0.03]}
    with zoo.method("as-vit").apply(loaded) as applied:
        features(loaded.model, pixels(1))
    assert applied.report.facts == {
        "threshold before block 2": 0.03,
        "tokens left at the end": applied.tokens_per_block[-1],
    }


def test_masking_gives_what_dropping_gives() -> None:
    """A masked token may only be seen by itself, so the [CLS] feature is that of the short sequence."""
    loaded = tiny("vit")
    dropping = zoo.method("as-vit", layers=[2], thresholds=[0.025])
    with dropping.apply(loaded) as applied:
        short = features(loaded.model, pixels(1))[:, 0]
        assert applied.tokens_per_block[-1] < 37
    masking = LearningASViT(layers=(2,))
    masking._learned.append(nn.Parameter(torch.tensor(0.025)))
    with masking.apply(loaded):
        torch.testing.assert_close(features(loaded.model, pixels(1))[:, 0], short, rtol=1e-3, atol=1e-3)


def test_the_straight_through_gradient_reaches_the_threshold() -> None:
    score = torch.tensor([[0.1, 0.2, 0.3]])
    threshold = torch.tensor(0.2, requires_grad=True)
    mask = threshold_mask(score, threshold, tau=0.05)
    assert mask.tolist() == [[0.0, 0.0, 1.0]]
    mask.sum().backward()
    soft = torch.sigmoid((score - 0.2) / 0.05)
    assert threshold.grad == pytest.approx(float(-(soft * (1 - soft)).sum() / 0.05), rel=1e-5)


def test_masked_softmax_leaves_out_all_but_the_own_token() -> None:
    logits = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    policy = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    attention = masked_softmax(logits, policy)
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 2, 4))
    assert float(attention[0, :, 0, 1].max()) < 1e-5 < float(attention[0, :, 1, 1].min())


def test_flops_are_those_of_the_published_formula() -> None:
    """DeiT-S at 224 pixels: 4.6 G multiplications."""
    encoder = tiny(
        "vit", hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=12
    )
    parts = encoder.anatomy.encoder
    assert parts is not None
    object.__setattr__(parts, "patch_size", 16)
    counts = [torch.tensor([197.0])] * 12
    assert float(encoder_flops(parts, counts, 196)) == pytest.approx(4.6, abs=0.03)


def test_refusals() -> None:
    with pytest.raises(Refused, match="CLS"):
        zoo.method("as-vit").apply(tiny("siglip"))
    with pytest.raises(Refused, match="only 4 blocks"):
        zoo.method("as-vit").apply(tiny("vit"))
    with pytest.raises(Refused, match="3 thresholds"):
        ASViT(thresholds=(0.1, 0.2, 0.3)).check(_trained_for_one())
    for wrong in ({"layers": [2, 1]}, {"layers": [0]}, {"layers": [1, 2], "thresholds": [0.1]}):
        with pytest.raises(BadParameter):
            zoo.method("as-vit", **wrong)


def _trained_for_one() -> Any:
    loaded = tiny("vit")
    loaded.model.config.as_vit = {"layers": [2], "thresholds": [0.03]}
    return loaded


def test_half_precision_and_batches() -> None:
    loaded = tiny("vit")
    loaded.model.to(torch.bfloat16)
    with zoo.method("as-vit", **STAGES).apply(loaded) as applied:
        out = features(loaded.model, pixels(3).to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())
    assert out.shape[:2] == (3, applied.tokens_per_block[-1])
