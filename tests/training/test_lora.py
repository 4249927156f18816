"""Adapters: ranks per layer, a start that changes nothing, a merge that changes only its own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from zoo.engines.lora import Adapters, linear_ranks, shared_ranks
from zoo.engines.surgery import share_parameters
from zoo.errors import NeedsExtra, RunFailed
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, anatomy_of
from zoo.models.tiny import tiny_model

pytest.importorskip("peft")
IDS = torch.randint(4, 250, (2, 9), generator=torch.Generator().manual_seed(1))


def parts(model: torch.nn.Module) -> Decoder:
    decoder = anatomy_of(model).decoder
    assert decoder is not None
    return decoder


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral"])
def test_adapters_come_and_go(name: str) -> None:
    """Ranks per layer; outputs unchanged at first; merged, the model is plain and computes what it did before."""
    original, _ = tiny_model(name)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    model = share_parameters(original)
    names = [key for key, _ in model.named_parameters()]
    with torch.no_grad():
        dense = model(IDS).logits
        adapters = Adapters(model, parts(model), [1, 2, 0, 4])
        assert torch.equal(model(IDS).logits, dense)
        ranks = {}
        for key, value in adapters.parameters.items():
            layer = int(key.split("layers.")[1].split(".")[0])
            assert ranks.setdefault(layer, min(value.shape)) == min(value.shape)
        assert ranks == {0: 1, 1: 2, 3: 4}
        assert len(adapters.parameters) == 3 * 7 * 2
        for value in adapters.parameters.values():
            value.normal_(std=0.3)
        adapted = model(IDS).logits
        assert not torch.allclose(adapted, dense, atol=0.1)
        adapters.merge()
        torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    assert [key for key, _ in model.named_parameters()] == names
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_the_scale_is_alpha_over_rank() -> None:
    model, _ = tiny_model("tiny-llama")
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    adapters = Adapters(model, parts(model), [1, 3, 1, 1], alpha_per_rank=2.0)
    found = {key.split(".lora_")[1][0]: v for key, v in adapters.parameters.items() if "1.mlp.up_proj" in key}
    with torch.no_grad():
        found["B"].normal_()
    expected = weight + 2.0 * found["B"].detach() @ found["A"].detach()
    adapters.merge()
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight.detach(), expected)


def test_a_pruned_model_with_widths_of_its_own(tmp_path: Path) -> None:
    """Adapters fit every layer's widths, and the merged model saves and loads as the pruned one did."""
    model, processor = tiny_model("tiny-llama")
    pruned = zoo.method("cfsp", sparsity=0.15).apply(
        LoadedModel(model, processor), calibration=IDS.repeat(3, 2)
    )
    widths = {layer.mlp.width for layer in parts(pruned.model).layers}
    assert len(widths) > 1
    adapters = Adapters(pruned.model, parts(pruned.model), [2] * 4)
    with torch.no_grad():
        for value in adapters.parameters.values():
            value.normal_(std=0.1)
        adapters.merge()
        loaded = zoo.load_model(pruned.save(tmp_path / "saved"))
        assert torch.equal(loaded.model(IDS).logits, pruned.model(IDS).logits)


def test_half_precision_models_learn_in_float32() -> None:
    model, _ = tiny_model("tiny-llama")
    model.to(torch.bfloat16)
    adapters = Adapters(model, parts(model), [2] * 4)
    assert {value.dtype for value in adapters.parameters.values()} == {torch.float32}
    loss = model(IDS).logits.float().square().mean()
    loss.backward()
    assert all(value.grad is not None for value in adapters.parameters.values())
    adapters.merge()
    assert model(IDS).logits.dtype == torch.bfloat16


def test_removed_adapters_leave_no_trace() -> None:
    model, _ = tiny_model("tiny-llama")
    kinds = [type(module) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    adapters = Adapters(model, parts(model), [2] * 4)
    assert torch.equal(torch.rand(1), expected)
    first = {key: value.detach().clone() for key, value in adapters.parameters.items()}
    adapters.remove()
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())
    again = Adapters(model, parts(model), [2] * 4).parameters
    assert all(torch.equal(again[key], value) for key, value in first.items())


def test_broken_adapters_are_not_merged() -> None:
    model, _ = tiny_model("tiny-llama")
    adapters = Adapters(model, parts(model), [2] * 4)
    with torch.no_grad():
        for value in adapters.parameters.values():
            value.fill_(torch.nan)
    with pytest.raises(RunFailed, match="cannot be merged"):
        adapters.merge()


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    model, _ = tiny_model("tiny-llama")
    with pytest.raises(NeedsExtra, match=r"pip install 'efficiency-zoo\[train\]'"):
        Adapters(model, parts(model), [2] * 4)


def test_ranks() -> None:
    model, _ = tiny_model("tiny-llama")
    found = linear_ranks(model, parts(model), [1, 2, 3, 4])
    assert len(found) == 4 * 7
    assert found["model.layers.2.mlp.down_proj"] == 3
    assert shared_ranks([1.0, 1.0, 1.0], 8) == [8, 8, 8]
    assert shared_ranks([0.0, 1.0, 3.0], 8) == [1, 6, 18]
