from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import BadInput
from zoo.models.anatomy import anatomy_of
from zoo.models.names import KNOWN
from zoo.models.tiny import _BUILDERS, byte_tokenizer, tiny_model


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inputs_of(name: str, processor: Any) -> Any:
    kind = KNOWN[name].kind
    if kind == "decoder":
        return processor(["A first text.", "Two"], return_tensors="pt", padding=True)
    if kind == "encoder":
        return processor(images=[picture(), picture(1)], return_tensors="pt")
    prompts = ["<image>\nWhat is it?", "<image>?"]
    return processor(text=prompts, images=[picture(), picture(1)], return_tensors="pt", padding=True)


@pytest.mark.parametrize("name", [name for name in _BUILDERS if KNOWN[name].kind != "diffusion"])
def test_takes_real_inputs_and_tells_them_apart(name: str) -> None:
    model, processor = tiny_model(name)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert anatomy_of(model).kind == KNOWN[name].kind
    with torch.no_grad():
        output = model(**inputs_of(name, processor))
    values = output.logits if "logits" in output else output.last_hidden_state
    assert torch.isfinite(values).all()
    assert 0.1 < values.std() < 10
    assert not torch.allclose(values[0], values[1], atol=0.01)


@pytest.mark.parametrize("name", _BUILDERS)
def test_weights_come_from_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    one, _ = tiny_model(name)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    two, _ = tiny_model(name)
    other, _ = tiny_model(name, seed=1)
    state, again, another = one.state_dict(), two.state_dict(), other.state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert any(not torch.equal(state[key], another[key]) for key in state)


def test_what_each_is_there_for() -> None:
    def decoder(name: str) -> Any:
        parts = anatomy_of(tiny_model(name)[0]).decoder
        assert parts is not None
        return parts

    assert [decoder(name).layers[0].attention.group for name in ("tiny-llama", "tiny-llama-mha")] == [2, 1]
    attention = decoder("tiny-qwen2").layers[0].attention
    assert attention.query.bias is not None
    assert attention.query.bias.abs().max() > 0.01
    attention = decoder("tiny-qwen3").layers[0].attention
    assert attention.query_norm is not None
    assert attention.head_dim * attention.heads != decoder("tiny-qwen3").hidden_size
    prefixes = {
        name: anatomy_of(tiny_model(name)[0]).encoder for name in _BUILDERS if KNOWN[name].kind == "encoder"
    }
    assert {name: encoder.prefix for name, encoder in prefixes.items() if encoder} == {
        "tiny-vit": 1,
        "tiny-deit": 2,
        "tiny-dinov2": 1,
        "tiny-dinov2-registers": 5,
        "tiny-clip": 1,
        "tiny-siglip": 0,
        "tiny-segvit": 0,
        "tiny-beit": 1,
    }


def test_llava_expands_the_placeholder_and_generates_in_a_padded_batch() -> None:
    model, processor = tiny_model("tiny-llava")
    inputs = inputs_of("tiny-llava", processor)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == [36, 36]
    assert inputs["attention_mask"][1, 0] == 0  # padded on the left
    together = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:]
    single = processor(text=["<image>?"], images=[picture(1)], return_tensors="pt")
    alone = model.generate(**single, max_new_tokens=6, do_sample=False)[:, -6:]
    assert torch.equal(together[1:], alone)


def test_bytes_round_trip() -> None:
    tokenizer = byte_tokenizer()
    text = "tab\t é 中文 😀 \r\n  two  spaces"
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_fields_can_be_changed_and_nonsense_is_refused() -> None:
    model, _ = tiny_model("tiny-llama", num_hidden_layers=2, attention="eager")
    assert len(model.model.layers) == 2
    assert model.config._attn_implementation == "eager"
    with pytest.raises(BadInput, match="there is no tiny model called 'tiny-gpt'; there are tiny-llama, "):
        tiny_model("tiny-gpt")
    with pytest.raises(BadInput, match="tiny-llama cannot be built so"):
        tiny_model("tiny-llama", attention="flesh")
