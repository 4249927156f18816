"""DART: against a slow reading of the paper, on hidden states and keys taken from the model by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import cast, load, picture, visual_places
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import zoo
from zoo.methods.visual_tokens.dart import DART, least_similar
from zoo.models import LoadedModel

PROMPTS = ("<image>\nWhat is it?", "Look at this: <image> Is it on the left?", "<image>?")


def inputs(loaded: LoadedModel, *samples: int) -> dict[str, Any]:
    pictures = [picture(s) for s in samples]
    texts = [PROMPTS[s] for s in samples]
    return dict(loaded.processor(text=texts, images=pictures, return_tensors="pt", padding=True))


def slow(
    normed: torch.Tensor, keys: torch.Tensor, visual: list[int], save: int, image: int, text: int
) -> list[int]:
    """Kept places, by loops. ``normed [L, D]``, ``keys [L, all heads * d]``."""
    norms = keys.abs().sum(-1).tolist()
    by_norm = sorted(visual, key=lambda place: -norms[place])[:image]
    after = range(max(visual) + 1, len(normed))
    pivots = by_norm + sorted(after, key=lambda place: -norms[place])[:text]
    each = min(save, len(visual) - len(by_norm)) // len(pivots)
    kept, left = set(by_norm), [place for place in visual if place not in by_norm]
    for pivot in pivots:
        cosine = {
            place: float(torch.cosine_similarity(normed[pivot], normed[place], dim=0)) for place in left
        }
        chosen = sorted(left, key=cosine.__getitem__)[:each]
        kept |= set(chosen)
        left = [place for place in left if place not in chosen]
    return sorted(kept)


@torch.no_grad()
def by_hand(loaded: LoadedModel, data: dict[str, Any], layer: int, **budget: int) -> list[int]:
    """The choice for one sample, from the unhooked model's own hidden states."""
    states = loaded.model(**data, output_hidden_states=True).hidden_states
    inner = loaded.model.model.language_model
    attention = inner.layers[layer - 1].self_attn
    before = states[layer - 1]
    length = before.shape[1]
    rotary = inner.rotary_emb(before, position_ids=torch.arange(length).unsqueeze(0))
    keys = attention.k_proj(inner.layers[layer - 1].input_layernorm(before))
    keys = keys.view(1, length, -1, attention.head_dim).transpose(1, 2)
    _, keys = apply_rotary_pos_emb(keys, keys, *rotary)
    keys = keys.repeat_interleave(attention.num_key_value_groups, dim=1)  # grouped queries
    flat = keys[0].transpose(0, 1).reshape(length, -1).float()
    visual = visual_places(loaded, data["input_ids"][0]).tolist()
    return slow(inner.norm(states[layer])[0].float(), flat, visual, **budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", [1, 3])
def test_selection_equals_the_paper_by_hand(layer: int, dtype: torch.dtype) -> None:
    loaded = load("tiny-llava", dtype)
    attention = loaded.anatomy.decoder.layers[0].attention
    assert attention.group > 1, "grouped queries are the case that counts"
    method = zoo.method("dart", keep_tokens=20, layer=layer, image_pivots=3, text_pivots=2)
    for sample in range(3):
        data = cast(inputs(loaded, sample), dtype)
        expected = by_hand(loaded, data, layer, save=20, image=3, text=2)
        with method.apply(loaded) as applied, torch.no_grad():
            applied(**data)
            assert applied.kept[layer][0].tolist() == expected


def test_a_padded_batch_keeps_what_single_samples_keep() -> None:
    loaded = load("tiny-llava")
    together = inputs(loaded, 0, 1, 2)
    pads = (together["attention_mask"] == 0).sum(1)
    assert bool(pads.any())
    # Through generate, which gives padded samples their own positions; plain calls count the padding.
    with zoo.method("dart", keep_tokens=20).apply(loaded) as applied:
        applied.generate(**together, max_new_tokens=1)
        batch = [(kept - pad).tolist() for kept, pad in zip(applied.kept[2], pads, strict=True)]
        single = []
        for sample in range(3):
            applied.generate(**inputs(loaded, sample), max_new_tokens=1)
            single.append(applied.kept[2][0].tolist())
    assert batch == single


def test_the_real_count() -> None:
    assert DART(keep_tokens=128).count(576) == 4 + 16 * 8
    assert DART(keep_tokens=7).count(576) == 4  # fewer than pivots: only the image pivots stay
    assert DART(keep_tokens=320, text_pivots=0).count(2880) == 4 + 80 * 4
    assert DART(keep_tokens=36).count(36) <= 36
    assert DART(keep_ratio=0.222).count(576) == 4 + 16 * 8
    for tokens in (1, 3, 5, 36):
        assert 1 <= DART(keep_tokens=tokens).count(tokens) <= tokens


def test_few_words_after_the_image_share_the_budget() -> None:
    """One text token after the image, four wanted: five pivots choose."""
    loaded = load("tiny-llava")
    data = dict(
        loaded.processor(text=["Many words before <image>?"], images=[picture(0)], return_tensors="pt")
    )
    after = data["input_ids"].shape[1] - 1 - int(visual_places(loaded, data["input_ids"][0]).max())
    assert after == 1
    with zoo.method("dart", keep_tokens=20).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        assert len(applied.kept[2][0]) == 4 + 20 // 5 * 5


def test_duplicates_leave_and_the_rest_stays() -> None:
    """Thirty copies of one pivot and six tokens of other directions: the six stay; the most similar rule loses them."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(16)
    visual = torch.cat((axes[:1].expand(30, -1), axes[1:7])) + 0.01 * torch.randn(36, 16, generator=generator)
    pivots = visual[:1]
    kept = least_similar(visual, pivots, torch.tensor([0]), 6)
    assert sorted(kept.tolist()) == [30, 31, 32, 33, 34, 35]
    inverted = least_similar(-visual, pivots, torch.tensor([0]), 6)
    assert not set(inverted.tolist()) & set(kept.tolist())


def test_no_pivot_takes_what_another_has() -> None:
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(25, 8, generator=generator)
    taken = torch.tensor([3, 11])
    pivots = torch.cat((visual[taken], torch.randn(3, 8, generator=generator)))
    kept = least_similar(visual, pivots, taken, 4).tolist()
    assert len(set(kept)) == 20
    assert not {3, 11} & set(kept)
    # The order of the pivots matters: each consumes tokens.
    assert kept[:4] != least_similar(visual, pivots.flip(0), taken, 4).tolist()[:4]
