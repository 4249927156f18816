"""What all depth methods promise: layers are really gone, from the configuration, the cache and the saved model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from depth import decoder_of, ids, loaded
from transformers import AutoModelForCausalLM

import zoo
from zoo.interface import Method
from zoo.methods.weights.blockpruner import BlockPruner
from zoo.methods.weights.laco import LaCo
from zoo.methods.weights.layer_lottery import LayerLottery
from zoo.methods.weights.shortgpt import ShortGpt
from zoo.methods.weights.sleb import Sleb
from zoo.models import LoadedModel

METHODS = {
    "shortgpt": ShortGpt(layers=2),
    "shortgpt-angular": ShortGpt(layers=2, criterion="angular"),
    "sleb": Sleb(layers=2),
    "laco": LaCo(merge_layers=3, threshold=-1, interval=3),
    "layer-lottery": LayerLottery(layers=2, weights="given"),
}
ARCHITECTURES = {
    "tiny-llama": {},
    "tiny-qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "tiny-qwen3": {},
    "tiny-gemma3": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    "tiny-phi3": {},
}
TEXTS = ["the cat sat on the mat", "one", "a line that is a good deal longer than the others"]


def greedy(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding without a cache, for one prompt."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=prompt, use_cache=False).logits
        prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
    return prompt


def check_generation(model: LoadedModel) -> None:
    """A padded batch with the cache gives what each prompt gives alone and without one."""
    inputs = model.processor(TEXTS, return_tensors="pt", padding=True)
    together = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for row, text in zip(together, TEXTS, strict=True):
        prompt = model.processor(text, return_tensors="pt")["input_ids"]
        alone = greedy(model.model, prompt, 8)
        assert row[-8:].tolist() == alone[0, -8:].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_layers_are_really_gone(name: str, architecture: str, tmp_path: Any) -> None:
    changes: dict[str, Any] = ARCHITECTURES[architecture]
    dense = loaded(architecture, num_hidden_layers=6, **changes)
    types = list(getattr(dense.model.config, "layer_types", None) or [])
    applied = METHODS[name].apply(dense, calibration=ids())
    kept = [index for index, bar in enumerate(applied.report.bars["FFN channels"]) if bar.kept]
    assert 1 < len(kept) < 6
    config = applied.model.config
    assert config.num_hidden_layers == len(kept) == len(decoder_of(applied.loaded).layers)
    assert list(getattr(config, "layer_types", None) or []) == [types[index] for index in kept if types]
    with torch.no_grad():
        output = applied(input_ids=ids(), use_cache=True)
    assert len(output.past_key_values.layers) == len(kept)
    assert all(layer.get_seq_length() for layer in output.past_key_values.layers)
    check_generation(applied.loaded)
    assert dense.model.config.num_hidden_layers == 6

    folder = applied.save(tmp_path / "short")
    again = zoo.load_model(str(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder)  # runs no code of ours
    assert type(plain) is type(dense.model)
    for model in (again.model, plain):
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids()).logits, output.logits)
    assert list(getattr(plain.config, "layer_types", None) or []) == [types[index] for index in kept if types]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_layers_are_really_gone(architecture: str, tmp_path: Any) -> None:
    changes: dict[str, Any] = ARCHITECTURES[architecture]
    dense = loaded(architecture, num_hidden_layers=6, **changes)
    applied = BlockPruner(layers=6).apply(dense, calibration=ids())
    heads = [layer.attention.heads for layer in decoder_of(applied.loaded).layers]
    with torch.no_grad():
        output = applied(input_ids=ids(), use_cache=True)
    filled = [getattr(layer, "keys", None) is not None for layer in output.past_key_values.layers]
    assert sum(filled) == sum(count > 0 for count in heads)
    check_generation(applied.loaded)
    again = zoo.load_model(str(applied.save(tmp_path / "short")))
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids()).logits, output.logits)
    again.model.generation_config.eos_token_id = None
    check_generation(again)


def test_generation_without_the_first_attention() -> None:
    """Masks and positions are told from the cache's first layer, which stores nothing here."""
    from zoo.engines.surgery import Block

    class First(BlockPruner):
        def choose(self, work: Any) -> list[Block]:
            return [Block(0, "attention"), Block(2, "mlp")]

    check_generation(First().apply(loaded(), calibration=ids()).loaded)


@pytest.mark.parametrize("name", [*METHODS, "blockpruner"])
def test_bfloat16(name: str) -> None:
    dense = loaded(num_hidden_layers=6)
    dense.model.to(torch.bfloat16)
    method: Method = METHODS.get(name) or BlockPruner(layers=3)
    applied = method.apply(dense, calibration=ids())
    assert {parameter.dtype for parameter in applied.model.parameters()} == {torch.bfloat16}
    ids_ = applied.generate(input_ids=ids(2, 5), max_new_tokens=4, do_sample=False)
    assert ids_.shape == (2, 9)
