"""VTW: withdrawal against decoding by hand, and the search against one full forward pass per candidate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import NEW, cast, greedy, load, picture

import zoo
from zoo.errors import BadInput, Refused
from zoo.methods.visual_tokens.vtw import VTW, first_below, withdrawal_divergence
from zoo.models import LoadedModel

PROMPTS = ("<image>\nWhat is it?", "Look at this: <image> Is it on the left?", "<image>?")


def inputs(loaded: LoadedModel, *samples: int) -> dict[str, Any]:
    pictures = [picture(s) for s in samples]
    texts = [PROMPTS[s] for s in samples]
    return dict(loaded.processor(text=texts, images=pictures, return_tensors="pt", padding=True))


def nothing(visual: torch.Tensor, places: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
    return places[:0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("position_ids", ["keep", "renumber"])
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen3-vl"])
def test_withdrawal_equals_decoding_by_hand(name: str, position_ids: str, dtype: torch.dtype) -> None:
    loaded = load(name, dtype)
    samples = [cast(inputs(loaded, s), dtype) for s in range(3)]
    expected = [greedy(loaded, data, nothing, 2, position_ids == "renumber") for data in samples]
    with zoo.method("vtw", layer=2, position_ids=position_ids).apply(loaded) as applied:
        for data, (tokens, lengths) in zip(samples, expected, strict=True):
            ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            assert ids[0, data["input_ids"].shape[1] :].tolist() == tokens
            assert [bar.kept for bar in applied.report.bars["visual tokens"]][2:] == [0] * (len(lengths) - 2)
        if dtype == torch.float32:
            batch = inputs(loaded, 0, 1, 2)
            ids = applied.generate(**batch, max_new_tokens=NEW, do_sample=False)
            assert ids[:, batch["input_ids"].shape[1] :].tolist() == [tokens for tokens, _ in expected]


def by_full_passes(loaded: LoadedModel, data: dict[str, Any], layers: range) -> torch.Tensor:
    """One forward pass of the whole model per candidate, and the divergence as a plain sum."""
    with torch.no_grad():
        log_full = loaded.model(**data).logits[0, -1].double().log_softmax(-1)
    found = []
    for layer in layers:
        with VTW(layer=layer).apply(loaded) as applied, torch.no_grad():
            log_short = applied(**data).logits[0, -1].double().log_softmax(-1)
        found.append(sum(float(q.exp() * (q - p)) for p, q in zip(log_full, log_short, strict=True)))
    return torch.tensor(found)


@pytest.mark.parametrize(
    "name", ["tiny-llava", "tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-internvl"]
)
def test_the_search_finds_what_full_passes_find(name: str) -> None:
    loaded = load(name)
    assert loaded.anatomy.decoder is not None
    layers = range(1, len(loaded.anatomy.decoder.layers))
    samples = [inputs(loaded, s) for s in range(2)]
    with torch.no_grad():
        loaded.model(**samples[0])  # transformers sets hooks of its own in the first pass
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())
    mean = torch.stack([by_full_passes(loaded, data, layers) for data in samples]).mean(0)
    for wanted in layers:
        eta = float(mean[wanted - 1]) * 1.001
        first = next(layer for layer in layers if mean[layer - 1] <= eta)
        assert VTW.fit(loaded, samples, eta=eta, first=1) == VTW(layer=first)
    with pytest.raises(BadInput, match="raise eta"):
        VTW.fit(loaded, samples, eta=float(mean.min()) * 0.99, first=1)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules()) == hooks


def test_the_search_says_what_is_missing() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, 0)
    with pytest.raises(BadInput, match=r"layers 1\.\.3"):
        VTW.fit(loaded, [data])  # the first candidate of the paper, 5, on four layers
    with pytest.raises(BadInput, match="at least one sample"):
        VTW.fit(loaded, [], first=1)
    with pytest.raises(BadInput, match="one sample at a time"):
        VTW.fit(loaded, [inputs(loaded, 0, 1)], first=1)
    with pytest.raises(BadInput, match="no image"):
        VTW.fit(loaded, [dict(loaded.processor(text=["no picture"], return_tensors="pt"))], first=1)
    with pytest.raises(Refused, match="vision-language"):
        VTW.fit(load_text_model(), [data], first=1)


def load_text_model() -> LoadedModel:
    from zoo.models.tiny import tiny_model

    return LoadedModel(*tiny_model("tiny-llama"), "tiny-llama")


def test_divergence_is_that_of_withdrawn_from_full() -> None:
    """KL is not symmetric: the two directions must not be confused."""
    generator = torch.Generator().manual_seed(0)
    full, short = torch.randn(30, generator=generator), torch.randn(4, 30, generator=generator)
    p, q = full.softmax(-1), short.softmax(-1)
    expected = torch.stack([sum(b * (b.log() - a.log()) for a, b in zip(p, row, strict=True)) for row in q])
    torch.testing.assert_close(withdrawal_divergence(full, short), expected)
    assert not torch.allclose(expected, (p * (p.log() - q.log())).sum(-1), rtol=1e-2)
    assert abs(float(withdrawal_divergence(full, full.unsqueeze(0)))) < 1e-6


def test_the_first_layer_below_the_mean_threshold() -> None:
    divergence = torch.tensor([[0.4, 0.02, 0.3, 0.0], [0.0, 0.02, 0.1, 0.0]])
    assert first_below(divergence, 0.021, first=5) == 6
    assert first_below(divergence, 0.21, first=5) == 5
    assert first_below(divergence, 0.001, first=5) == 8
