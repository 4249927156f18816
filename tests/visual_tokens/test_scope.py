"""SCOPE: facility location weighted by saliency."""

from __future__ import annotations

import pytest
import torch
from reference import load, picture

import zoo
from zoo.methods.visual_tokens.scope import Scope


def by_the_paper(x: torch.Tensor, saliency: torch.Tensor, count: int, alpha: float, add: bool) -> list[int]:
    """Every gain anew in every step, in float64."""
    cosine = torch.nn.functional.cosine_similarity(x.double()[:, None], x.double()[None], dim=-1)
    weight = saliency.double() ** alpha
    covered = torch.zeros(len(x), dtype=torch.float64)
    picked: list[int] = []
    for _ in range(count):
        best, best_score = -1, -1.0
        for token in range(len(x)):
            if token in picked:
                continue
            gain = float((cosine[token] - covered).clamp(min=0).sum())
            score = gain + float(weight[token]) if add else gain * float(weight[token])
            if score > best_score:
                best, best_score = token, score
        picked.append(best)
        covered = torch.maximum(covered, cosine[best])
    return picked


@pytest.mark.parametrize("combination", ["multi", "add"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_lazy_gains_pick_what_full_gains_pick(alpha: float, combination: str) -> None:
    generator = torch.Generator().manual_seed(int(10 * alpha))
    x = torch.randn(12, 6, generator=generator).repeat(10, 1) + 0.5 * torch.randn(120, 6, generator=generator)
    saliency = torch.rand(120, generator=generator)
    method = Scope(keep_tokens=30, alpha=alpha, combination=combination)
    assert method.order(x, saliency, 30).tolist() == by_the_paper(
        x, saliency, 30, alpha, combination == "add"
    )


def test_groups_are_covered_by_their_most_salient_member() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.eye(4).repeat_interleave(5, dim=0) + 1e-3 * torch.randn(20, 4, generator=generator)
    saliency = torch.full((20,), 0.5)
    best = [1, 7, 13, 19]
    saliency[best] = 1.0
    assert sorted(Scope().order(x, saliency, 4).tolist()) == best
    assert not set(best) & set(Scope().order(x, 1.5 - saliency, 4).tolist())


def test_more_tokens_than_directions_are_picked_without_repeats() -> None:
    order = Scope().order(torch.ones(9, 3), torch.ones(9), 9)
    assert order.tolist() == list(range(9))


def class_rows(loaded: zoo.LoadedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden state and summed [CLS] attention of the last but one layer, from eager attention."""
    tower = loaded.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        output = tower(pixels, output_hidden_states=True, output_attentions=True)
    tower.set_attn_implementation("sdpa")
    return output.hidden_states[-2][:, 1:], output.attentions[-2].sum(1)[:, 0, 1:]


def test_a_model_keeps_what_its_encoder_says() -> None:
    loaded = load("tiny-llava")
    data = loaded.processor(text=["<image> What?"], images=[picture(1)], return_tensors="pt")
    with torch.no_grad(), zoo.method("scope", keep_tokens=7).apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[-1][0]
    hidden, saliency = class_rows(loaded, data["pixel_values"])
    start = int((data["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[0])
    assert (kept - start).tolist() == sorted(by_the_paper(hidden[0], saliency[0], 7, 1.0, False))


def test_crops_share_the_budget_and_newlines_leave() -> None:
    loaded = load("tiny-llava-next")
    # 96 x 96 fills two by two tiles: five crops of 36 tokens, and one newline for each of 12 rows.
    data = loaded.processor(text=["<image> What?"], images=[picture(1, 96, 96)], return_tensors="pt")
    with torch.no_grad(), zoo.method("scope", keep_tokens=22).apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[-1][0]
    hidden, saliency = class_rows(loaded, data["pixel_values"][0])
    start = int((data["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[0])
    # int(22 / 5) = 4 per crop
    expected = [start + token for token in by_the_paper(hidden[0], saliency[0], 4, 1.0, False)]
    for tile in range(4):
        for token in by_the_paper(hidden[tile + 1], saliency[tile + 1], 4, 1.0, False):
            row, column = 6 * (tile // 2) + token // 6, 6 * (tile % 2) + token % 6
            expected.append(start + 36 + row * 13 + column)
    assert kept.tolist() == sorted(expected)


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-smolvlm"])
def test_without_a_class_token_projected_tokens_and_received_attention_decide(name: str) -> None:
    loaded = load(name)
    data = loaded.processor(text=["<image> What?"], images=[picture(1, 48, 48)], return_tensors="pt")
    with torch.no_grad(), zoo.method("scope", keep_ratio=0.4).apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[-1][0].tolist()
    with torch.no_grad(), zoo.method("scope", keep_ratio=0.4, alpha=0.0).apply(loaded) as applied:
        applied(**data)
        plain = applied.kept[-1][0].tolist()
    assert kept == sorted(kept)
    assert len(kept) == len(plain) > 1
    assert kept != plain
