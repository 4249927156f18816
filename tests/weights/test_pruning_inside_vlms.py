"""Weight methods on the decoder inside a vision-language model: alone, in a stack, and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import decided, decoder_of, masked, state
from PIL import Image

import zoo
from zoo.engines.surgery import Block
from zoo.errors import Refused
from zoo.families.layer_removal import LayerRemover
from zoo.families.weights import Work
from zoo.methods.weights.cfsp import Cfsp
from zoo.methods.weights.flap import Flap
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

VLMS = (
    "tiny-llava",
    "tiny-llava-next",
    "tiny-qwen2.5-vl",
    "tiny-qwen3-vl",
    "tiny-internvl",
    "tiny-smolvlm",
    "tiny-idefics3",
)
TEXT = {"calibration": ["a text to calibrate on, with a few words. " * 20], "samples": 6, "length": 24}


class NoFirstAttention(LayerRemover):
    """Removes the attention of layer 0, and layer 2."""

    slug = "no-first-attention"

    def choose(self, work: Work) -> list[Block]:
        return [Block(0, "attention"), Block(2)]


def load(name: str) -> LoadedModel:
    model, processor = tiny_model(name)
    model.generation_config.eos_token_id = None
    return LoadedModel(model, processor, name)


def inputs(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    return dict(
        loaded.processor(images=[Image.fromarray(pixels)], text=["<image>\nwhat is it?"], return_tensors="pt")
    )


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_the_decoder_is_pruned_with_text(name: str) -> None:
    loaded = load(name)
    before = state(loaded.model)
    applied = Flap(sparsity=0.3).apply(loaded, **TEXT)
    assert applied.report.kept == decoder_of(applied.loaded).prunable_parameters() < applied.report.total
    windows = zoo.data.calibration_windows(loaded.tokenizer, TEXT["calibration"], 6, 24)
    dense = masked(loaded, decided(Flap(sparsity=0.3), loaded, windows))
    torch.testing.assert_close(
        applied(**inputs(loaded)).logits, dense(**inputs(loaded)).logits, rtol=0, atol=1e-4
    )
    assert all(torch.equal(before[key], value) for key, value in state(loaded.model).items())


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl", "tiny-internvl"])
def test_layers_without_attention_cache_nothing(name: str) -> None:
    applied = NoFirstAttention().apply(load(name))
    options: dict[str, Any] = {**inputs(applied.loaded), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(applied.generate(**options), applied.generate(**options, use_cache=False))
    cache = applied(**inputs(applied.loaded), use_cache=True).past_key_values
    assert [getattr(layer, "keys", None) is not None for layer in cache.layers] == [False, True, True]


def test_a_stack_prunes_weights_and_tokens_and_reports_both() -> None:
    loaded = load("tiny-llava")
    before = state(loaded.model)
    stack = zoo.method("visionzip+flap", sparsity=0.3)
    with stack.apply(loaded, **TEXT) as applied:
        alone = Flap(sparsity=0.3).apply(loaded, **TEXT)
        short = applied(**inputs(loaded), use_cache=True).past_key_values.get_seq_length()
        assert short < alone(**inputs(loaded), use_cache=True).past_key_values.get_seq_length()
        weights, tokens = applied.reports
        assert (weights.method, weights.unit) == ("flap", "decoder parameters")
        assert weights.kept == alone.report.kept
        assert tokens.method == "visionzip"
        assert tokens.kept < tokens.total
    assert all(torch.equal(before[key], value) for key, value in state(loaded.model).items())


def test_only_alike_layers_can_be_saved(tmp_path: Path) -> None:
    loaded = load("tiny-llava")
    uneven = Flap(sparsity=0.3).apply(loaded, **TEXT)
    with pytest.raises(Refused, match="decoder layers differ in width cannot be saved"):
        uneven.save(tmp_path / "uneven")
    assert not list(tmp_path.iterdir())
    alike = Cfsp(ffn_sparsity=0.4, round_to=16, slope=0.0).apply(loaded, **TEXT)
    again = zoo.load_model(alike.save(tmp_path / "alike"), device="cpu")
    assert torch.equal(again.model(**inputs(loaded)).logits, alike(**inputs(loaded)).logits)
