"""CDPruner: greedy MAP of a determinantal point process conditioned on the question."""

from __future__ import annotations

import pytest
import torch
from reference import ARCHITECTURES, decoder_call, load, picture, visual_places

import zoo
from zoo.engines.selection import dpp_map
from zoo.methods.visual_tokens.cdpruner import CDPruner, relevance


def by_determinant(x: torch.Tensor, quality: torch.Tensor, count: int) -> list[int]:
    """Each pick makes the determinant of the picked part of the kernel largest, in float64."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    kernel = quality.double()[:, None] * (unit @ unit.T) * quality.double()
    picked: list[int] = []
    for _ in range(count):
        left = [token for token in range(len(x)) if token not in picked]
        values = [float(torch.linalg.det(kernel[[*picked, token]][:, [*picked, token]])) for token in left]
        picked.append(left[values.index(max(values))])
    return picked


@pytest.mark.parametrize("seed", range(4))
def test_picks_maximise_the_determinant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, quality = torch.randn(25, 16, generator=generator), torch.rand(25, generator=generator)
    assert dpp_map(x, quality, 9).tolist() == by_determinant(x, quality, 9)


def test_more_picks_than_the_rank_of_the_tokens_stay_distinct() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    order = dpp_map(x, torch.ones(20), 20)
    assert sorted(order.tolist()) == list(range(20))


def test_relevance_is_scaled_over_all_crops_together() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens, texts = torch.randn(3, 10, 8, generator=generator), torch.randn(2, 8, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(tokens[:, :, None].double(), texts.double(), dim=-1).mean(
        -1
    )
    for sign in (-1.0, 1.0):
        found = relevance(tokens, texts, sign)
        signed = sign * cosine
        expected = (signed - signed.min() + 1e-6) / (signed.max() - signed.min())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert relevance(torch.ones(1, 4, 8), texts, 1.0).tolist() == [[1.0] * 4]


def test_relevant_distinct_tokens_win() -> None:
    x = torch.eye(12)
    x[6] = x[5]
    quality = torch.linspace(0.05, 0.1, 12)
    quality[[2, 5, 6, 9]] = torch.tensor([0.9, 1.0, 0.95, 0.8])
    method = CDPruner()
    assert method.order(x, quality, 3).tolist() == [5, 2, 9]
    assert not {2, 5, 9} & set(method.order(x, 1.05 - quality, 3).tolist())


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_a_model_scores_by_the_text_behind_the_picture(name: str) -> None:
    loaded = load(name)
    data = dict(
        loaded.processor(
            text=["Look here: <image> Is it red?"], images=[picture(1, 48, 48)], return_tensors="pt"
        )
    )
    with torch.no_grad():
        embeds = decoder_call(loaded, data)["inputs_embeds"][0]
        with zoo.method("cdpruner", keep_ratio=0.4).apply(loaded) as applied:
            applied(**data)
            kept = applied.kept[-1][0]
    places = visual_places(loaded, data["input_ids"][0])
    question = embeds[int(places.max()) + 1 :].mean(0)
    cosine = torch.nn.functional.cosine_similarity(embeds[places].double(), question.double(), dim=-1)
    quality = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    expected = by_determinant(embeds[places], quality, round(0.4 * len(places)))
    assert kept.tolist() == sorted(places[expected].tolist())


def test_text_in_front_counts_when_none_follows() -> None:
    loaded = load("tiny-llava")
    kept = []
    for text in ("Is it red?<image>", "How many are there?<image>", "Read the sign.<image>"):
        data = loaded.processor(text=[text], images=[picture(1)], return_tensors="pt")
        with torch.no_grad(), zoo.method("cdpruner", keep_ratio=0.3).apply(loaded) as applied:
            applied(**data)
            kept.append((applied.kept[-1][0] - visual_places(loaded, data["input_ids"][0])[0]).tolist())
    assert any(other != kept[0] for other in kept[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_crop_keeps_its_share_in_order(name: str, dtype: torch.dtype) -> None:
    loaded = load(name, dtype)
    data = loaded.processor(
        text=["<image> What?", "A longer question about it: <image> Why?"],
        images=[picture(1), picture(2, 40, 110)],
        return_tensors="pt",
        padding=True,
    )
    data = {key: value.to(dtype) if value.is_floating_point() else value for key, value in data.items()}
    with torch.no_grad(), zoo.method("cdpruner", keep_ratio=0.4).apply(loaded) as applied:
        applied(**data)
        for sample, kept in enumerate(applied.kept[-1]):
            visual = visual_places(loaded, data["input_ids"][sample]).tolist()
            assert kept.tolist() == sorted(set(kept.tolist()))
            assert set(kept.tolist()) <= set(visual)
            # int() per crop: at most one token per crop is lost
            assert round(0.4 * len(visual)) - 10 < len(kept) <= round(0.4 * len(visual))
