"""GlobalCom2 against loops, and on the tiled architectures."""

from __future__ import annotations

import math

import pytest
import torch
from reference import load, picture

import zoo
from zoo.errors import Refused
from zoo.methods.visual_tokens.globalcom2 import GlobalCom2, tile_choices, tile_ratios


def plain_ratios(
    thumbnail: torch.Tensor, rows: int, columns: int, share: float, temperature: float
) -> list[float]:
    height, width = thumbnail.shape
    votes = [0.0] * (rows * columns)
    for i in range(height):
        for j in range(width):
            row, column = min(i // (height // rows), rows - 1), min(j // (width // columns), columns - 1)
            votes[row * columns + column] += float(thumbnail[i, j])
    weights = [math.exp((vote - max(votes)) / temperature) for vote in votes]
    weights = [w / (sum(weights) + 1e-8) for w in weights]
    mean = sum(weights) / len(weights)
    return [min(1.0, share * (1 + w - mean)) for w in weights]


@pytest.mark.parametrize("arrangement", [(1, 1), (2, 2), (1, 3), (3, 2)], ids=str)
def test_ratios_equal_a_loop_over_cells(arrangement: tuple[int, int]) -> None:
    thumbnail = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    found = tile_ratios(thumbnail, arrangement, 0.8, 2.0)
    torch.testing.assert_close(found, torch.tensor(plain_ratios(thumbnail, *arrangement, 0.8, 2.0)))


def test_a_tile_that_the_thumbnail_looks_at_keeps_more_and_the_right_tokens() -> None:
    """Two tiles side by side; what matters is in the right half of the right tile."""
    thumbnail = torch.zeros(4, 4)
    thumbnail[:, 3] = 2.0
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij"), -1).flatten(0, 1)
    tile = place[:, 1] // 4
    ratios = tile_ratios(thumbnail, (1, 2), 0.5, 1.0)
    assert ratios[1] > ratios[0]
    left, right = tile_choices(thumbnail, torch.ones(32), tile, place, (4, 8), ratios)
    assert len(right) > len(left) > 0
    assert (place[right[:8], 1] >= 6).all()
    worst = tile_choices(-thumbnail, torch.ones(32), tile, place, (4, 8), ratios)[1]
    assert thumbnail[0, place[right, 1] // 2].sum() > thumbnail[0, place[worst, 1] // 2].sum()


@pytest.mark.parametrize("model", ["tiny-llava-next", "tiny-internvl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tiled_pictures_keep_the_share_in_order(model: str, dtype: torch.dtype) -> None:
    loaded = load(model, dtype)
    data = loaded.processor(
        images=[picture(0), picture(1, 40, 90), picture(2, 120, 40)],
        text=["<image>\na", "<image>\nlonger one", "so <image>\nthen"],
        return_tensors="pt",
        padding=True,
    )
    data = {name: value.to(dtype) if value.is_floating_point() else value for name, value in data.items()}
    with torch.no_grad(), zoo.method("globalcom2", keep_ratio=0.4).apply(loaded) as applied:
        applied(**data)
        kept, total = applied.kept[-1], applied.reducer.visual_total
    assert total is not None
    for sample, places in enumerate(kept):
        assert places.tolist() == sorted(set(places.tolist()))
        assert (data["input_ids"][sample, places] == loaded.anatomy.image_token_id).all()
        newlines = 0 if model == "tiny-internvl" else 12
        assert 0.3 * int(total[sample]) - 6 <= len(places) <= 0.41 * int(total[sample]) + newlines


def test_without_tiles_the_thumbnail_rule_is_left() -> None:
    loaded = load("tiny-llava")
    data = loaded.processor(images=[picture(0)], text=["<image>\na"], return_tensors="pt")
    places = (data["input_ids"][0] == loaded.anatomy.image_token_id).nonzero().squeeze(-1)
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    block = encoder.blocks[-1]
    states = []
    hook = block.module.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad(), zoo.method("globalcom2", keep_ratio=0.25).apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[-1][0]
        hook.remove()
        normed = block.norm1(states[0])
        heads = [
            part(normed)[0].view(len(normed[0]), -1, block.attention.head_dim)
            for part in (block.attention.query, block.attention.key)
        ]
    logits = torch.einsum("hd,nhd->n", heads[0][0], heads[1][1:])  # the mean over heads up to a factor
    assert kept.tolist() == places[logits.topk(9).indices.sort().values].tolist()


def test_an_encoder_without_cls_is_refused() -> None:
    with pytest.raises(Refused, match=r"globalcom2 needs a vision encoder with a \[CLS\]"):
        GlobalCom2().apply(load("tiny-llava-onevision"))
