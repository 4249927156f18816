"""G-Prune against the formula written out with a matrix power, and on tiled pictures."""

from __future__ import annotations

import pytest
import torch
from reference import load, picture

import zoo
from zoo.errors import BadInput
from zoo.methods.visual_tokens.g_prune import GPrune, graph_flow
from zoo.models.packing import Placeholders


def plain_flow(
    tokens: torch.Tensor, similarity: float, temperature: float, steps: int
) -> tuple[list[float], list[int]]:
    unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    count = len(tokens)
    rows, degree = [], []
    for i in range(count):
        cosines = [float(unit[i] @ unit[j]) for j in range(count)]
        weights = [
            torch.tensor(c / temperature).exp().item() if c >= similarity or i == j else 0.0
            for j, c in enumerate(cosines)
        ]
        rows.append([w / sum(weights) for w in weights])
        degree.append(sum(w > 0 for w in weights))
    power = torch.linalg.matrix_power(torch.tensor(rows, dtype=torch.float64), steps)
    flow = tokens.double().norm(dim=-1) @ power
    return [float(f) / d for f, d in zip(flow, degree, strict=True)], degree


def test_the_flow_equals_the_matrix_power() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 8, generator=generator).repeat_interleave(6, 0)
    tokens = (tokens + 0.5 * torch.randn(24, 8, generator=generator)) * torch.rand(24, 1, generator=generator)
    score, degree = graph_flow(tokens, 0.5, 0.1, 3)
    expected, links = plain_flow(tokens, 0.5, 0.1, 3)
    assert degree.tolist() == links
    assert max(links) > 1
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-6)


def test_distinct_tokens_beat_a_background_of_copies() -> None:
    generator = torch.Generator().manual_seed(1)
    background = torch.ones(30, 64) + 0.01 * torch.randn(30, 64, generator=generator)
    distinct = torch.randn(6, 64, generator=generator)
    tokens = torch.cat((background[:15], distinct, background[15:]))
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    kept = GPrune().order(tokens, 6)
    assert sorted(kept.tolist()) == list(range(15, 21))


def test_a_zero_token_does_no_harm() -> None:
    tokens = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    tokens[2] = 0
    score, degree = graph_flow(tokens, 0.5, 0.03, 5)
    assert torch.isfinite(score).all()
    assert (int(degree[2]), float(score[2])) == (1, 0.0)


@pytest.mark.parametrize("options", [{"keep_ratio": 0.3}, {"keep_tokens": 31}], ids=str)
def test_thumbnail_and_mosaic_have_their_own_budgets_and_newlines_stay(options: dict[str, float]) -> None:
    loaded = load("tiny-llava-next")
    data = loaded.processor(images=[picture(0)], text=["<image>\nwhat?"], return_tensors="pt")
    method = GPrune(**options)
    with torch.no_grad(), method.apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[-1][0]
    assert kept.tolist() == sorted(kept.tolist())
    anatomy = loaded.anatomy
    assert anatomy.packer is not None
    places = (data["input_ids"][0] == anatomy.image_token_id).nonzero().squeeze(-1)
    mask = data["input_ids"] == anatomy.image_token_id
    given = {name: data[name] for name in ("pixel_values", "image_sizes")}
    packed = anatomy.packer(anatomy.vlm, "image", given, Placeholders(data["input_ids"], mask))[0]
    part = packed.part[torch.isin(places, kept)]
    sizes = [int((packed.part == number).sum()) for number in (0, 1)]
    assert [int((part == number).sum()) for number in (0, 1)] == method.counts(sizes)
    assert int((part == -1).sum()) == int((packed.part == -1).sum()) > 0
    if "keep_tokens" in options:
        assert sum(method.counts(sizes)) == 31


def test_counts_are_rounded_down() -> None:
    assert GPrune(keep_ratio=0.5).counts([576, 31]) == [288, 15]
    assert GPrune(keep_tokens=10).counts([30, 10]) == [8, 2]
    with pytest.raises(BadInput, match="only 40"):
        GPrune(keep_tokens=41).counts([30, 10])


def test_bf16_runs_and_keeps_as_many() -> None:
    loaded = load("tiny-llava", torch.bfloat16)
    data = loaded.processor(images=[picture(0)], text=["<image>\nwhat?"], return_tensors="pt")
    with torch.no_grad(), zoo.method("g-prune", keep_ratio=0.25).apply(loaded) as applied:
        applied(**{**data, "pixel_values": data["pixel_values"].bfloat16()})
        assert len(applied.kept[-1][0]) == 9
