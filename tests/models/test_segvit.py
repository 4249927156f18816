"""SegViT: an ordinary transformers model on several encoders, which our loader reads too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from zoo.errors import BadInput, Refused
from zoo.models.segvit import BACKBONES, QueryAttention, SegViT, SegViTConfig
from zoo.models.tiny import tiny_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "mlp_ratio": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
HEADS = {"head_size": 32, "head_layers": 2, "head_heads": 2, "num_labels": 5}


def build(kind: str = "vit", exits: tuple[int, ...] = (1, 3)) -> SegViT:
    return SegViT(SegViTConfig({"model_type": kind, **SIZES}, exits=exits, **HEADS)).eval()


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_segments_and_loads_again(kind: str, tmp_path: Path) -> None:
    model, x = build(kind), torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(x)
        assert out.logits.shape == (2, 5, 48, 48)
        assert out.last_hidden_state.shape == (2, 36, 64)
        assert 0 <= float(out.logits.min()) <= float(out.logits.max()) <= 1
        model.save_pretrained(tmp_path / "saved")
        again = zoo.load_model(tmp_path / "saved", device="cpu")
        assert isinstance(again.model, SegViT)
        assert torch.equal(again.model(x).logits, out.logits)
    encoder = again.anatomy.encoder
    assert encoder is not None
    assert (encoder.prefix, encoder.has_cls, len(encoder.blocks)) == (0, False, 4)


def test_pictures_need_not_be_square() -> None:
    model, _ = tiny_model("tiny-dinov2")
    segmenter = SegViT(SegViTConfig(model.config.to_dict(), exits=(1, 3), **HEADS)).eval()
    with torch.no_grad():
        assert segmenter(torch.randn(1, 3, 40, 56)).logits.shape == (1, 5, 40, 56)


def test_mask_logits_are_the_mean_over_heads() -> None:
    torch.manual_seed(0)
    attention = QueryAttention(12, 3)
    queries, tokens = torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    _, logits = attention(queries, tokens)
    query, key = attention.query(queries), attention.key(tokens)
    heads = [
        query[..., part] @ key[..., part].transpose(1, 2) / 2.0
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(logits, torch.stack(heads).mean(0))


def test_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    head = build().heads[0]
    tokens = torch.randn(1, 9, 64)
    valid = torch.arange(9)[None] < 6
    with torch.no_grad():
        short, padded = head(tokens[:, :6]), head(tokens, valid)
    torch.testing.assert_close(padded.classes, short.classes)
    torch.testing.assert_close(padded.masks[..., :6], short.masks)


def test_refusals() -> None:
    with pytest.raises(BadInput, match="last block"):
        build(exits=(1, 2))
    with pytest.raises(Refused, match="stands on"):
        build("clip_vision_model")
