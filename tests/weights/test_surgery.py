"""Removing layers and halves of layers, replacing weights, slicing the residual stream: against the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import MODELS, build, decoder_of, ids, logits, padded, state
from torch import nn

from zoo.engines.slicing import fold_norms, slice_ends, slice_layer
from zoo.engines.surgery import Block, remove_blocks, replace_weights, share_parameters
from zoo.errors import BadParameter, Refused
from zoo.families.layer_removal import LayerRemover
from zoo.families.weights import Work
from zoo.methods.weights.flap import Flap
from zoo.models import LoadedModel
from zoo.models.pruned import refit


class Remove(LayerRemover):
    """Removes the blocks it is given."""

    slug = "remove"
    blocks: tuple[Block, ...] = ()

    def choose(self, work: Work) -> tuple[Block, ...]:
        return self.blocks or tuple(Block(index) for index in range(self.count(len(work.decoder.layers))))


def silenced(loaded: LoadedModel, *blocks: Block) -> Any:
    """The dense model in which these blocks add nothing."""
    model = copy.deepcopy(loaded.model)
    for block in blocks:
        layer = decoder_of(LoadedModel(model)).layers[block.index]
        for part, where in ((layer.attention.output, "attention"), (layer.mlp.down, "mlp")):
            if block.part in (where, "layer"):
                for parameter in part.linear.parameters():
                    nn.init.zeros_(parameter)
    return model


BLOCKS = [
    (Block(1),),
    (Block(0, "attention"),),
    (Block(0, "attention"), Block(1, "attention"), Block(2, "mlp")),
    (Block(0, "attention"), Block(0, "mlp"), Block(2, "mlp")),
]


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "+".join(str(block) for block in blocks))
@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_computes_what_it_did(name: str, blocks: tuple[Block, ...]) -> None:
    loaded = build(name)
    before = state(loaded.model)
    applied = Remove(blocks=blocks).apply(loaded)
    reference = silenced(loaded, *blocks)
    for inputs in (padded("left"), padded("right")):
        torch.testing.assert_close(logits(applied, **inputs), logits(reference, **inputs), rtol=0, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in state(loaded.model).items())

    options = {"max_new_tokens": 9, "do_sample": False}
    expected = reference.generate(**padded(), **options)
    assert torch.equal(applied.generate(**padded(), **options), expected)
    assert torch.equal(applied.generate(**padded(), **options, use_cache=False), expected)
    beams = {**options, "num_beams": 3}
    assert torch.equal(applied.generate(**padded(), **beams), reference.generate(**padded(), **beams))

    # The cache has one entry for each layer that stays, and nothing in those without attention.
    layers = decoder_of(applied.loaded).layers
    cache = applied(input_ids=ids(1, 12), use_cache=True).past_key_values
    assert len(cache.layers) == len(layers) == applied.model.config.num_hidden_layers
    assert [getattr(entry, "keys", None) is not None for entry in cache.layers] == [
        layer.attention.heads > 0 for layer in layers
    ]
    assert cache.get_seq_length() == 12


def test_the_report_shows_layers_that_left() -> None:
    loaded = build("llama-gqa")
    report = Remove(blocks=(Block(1), Block(2, "mlp"))).apply(loaded).report
    assert [bar.kept for bar in report.bars["attention heads"]] == [6, 0, 6]
    assert [bar.kept for bar in report.bars["FFN channels"]] == [80, 0, 0]
    per_layer = report.total / 3
    assert report.kept == 2 * per_layer - 3 * 48 * 80
    assert report.facts["removed"] == "layer 1, mlp 2"


def test_how_many_layers() -> None:
    loaded = build("llama-gqa")
    assert Remove(sparsity=0.3).apply(loaded).report.kept_ratio == pytest.approx(2 / 3)
    assert Remove(layers=2).apply(loaded).report.kept_ratio == pytest.approx(1 / 3)
    assert Remove(layers=0).apply(loaded).model.config.num_hidden_layers == 3
    with pytest.raises(BadParameter, match="at least one must stay"):
        Remove(layers=3).apply(loaded)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        remove_blocks(decoder_of(loaded), [Block(3)])
    with pytest.raises(ValueError, match="at least one layer with attention"):
        remove_blocks(decoder_of(loaded), [Block(0, "attention"), Block(1), Block(2, "attention")])


def test_what_is_left_can_be_changed_again() -> None:
    once = Remove(blocks=(Block(1, "attention"),)).apply(build("llama-gqa")).loaded
    twice = Remove(blocks=(Block(0), Block(1, "mlp"))).apply(once)
    assert [layer.attention.heads for layer in decoder_of(twice.loaded).layers] == [6]
    assert type(twice.model).__name__ == "LlamaForCausalLM"  # a plain model again
    with pytest.raises(Refused, match="attention and a feed-forward block in every layer"):
        Flap().apply(once, calibration=ids())


@pytest.mark.parametrize("name", ["llama-gqa", "phi3"])
def test_new_weights_are_new_storage(name: str) -> None:
    loaded = build(name)
    before = state(loaded.model)
    model = share_parameters(loaded.model)
    layer = decoder_of(LoadedModel(model)).layers[1]
    new = torch.randn(layer.attention.key.weight.shape)
    replace_weights([(layer.attention.key, new), (layer.mlp.gate, layer.mlp.gate.weight * 0)])
    layer = decoder_of(LoadedModel(model)).layers[1]
    assert torch.equal(layer.attention.key.weight, new)
    assert not layer.mlp.gate.weight.any()
    dense = decoder_of(loaded).layers[1]
    for part, old in zip(layer.linears, dense.linears, strict=True):
        if part.name not in ("k_proj", "gate_proj") and part.rows not in (dense.attention.key.rows, (0, 80)):
            assert torch.equal(part.weight, old.weight)
    assert all(torch.equal(before[key], value) for key, value in state(loaded.model).items())
    with pytest.raises(ValueError, match="has shape"):
        replace_weights([(layer.attention.query, new[:1])])


# --- slicing ----------------------------------------------------------------------------------------------------


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0][:, :columns]


@torch.no_grad()
def into_subspace(model: Any, basis: torch.Tensor) -> None:
    """Let everything in the residual stream lie in the span of ``basis``."""
    project, decoder = basis @ basis.T, decoder_of(LoadedModel(model))
    decoder.embed.weight.copy_(decoder.embed.weight @ project)
    for layer in decoder.layers:
        for part in (layer.attention.output, layer.mlp.down):
            part.weight.copy_(project @ part.weight)
            if part.bias is not None:
                part.bias.copy_(project @ part.bias)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"gemma3"}))
def test_slicing_what_is_not_used_changes_nothing(name: str) -> None:
    loaded, generator = build(name), torch.Generator().manual_seed(0)
    used = orthonormal(48, 32, generator)
    into_subspace(loaded.model, used)
    before = state(loaded.model)
    model = share_parameters(loaded.model)
    fold_norms(decoder_of(LoadedModel(model)), model)
    torch.testing.assert_close(logits(model, **padded()), logits(loaded.model, **padded()), rtol=0, atol=1e-4)

    layers = decoder_of(LoadedModel(model)).layers
    entering, middle = ([used @ orthonormal(32, 32, generator) for _ in layers] for _ in range(2))
    last = orthonormal(48, 48, generator)
    for layer, *bases in zip(layers, entering, middle, [*entering[1:], last], strict=True):
        slice_layer(layer, *bases)
    slice_ends(decoder_of(LoadedModel(model)), model, entering[0], last)
    refit(model)
    torch.testing.assert_close(logits(model, **padded()), logits(loaded.model, **padded()), rtol=0, atol=1e-4)
    decoder = decoder_of(LoadedModel(model))
    assert (decoder.hidden_size, decoder.norm.weight.shape) == (32, (48,))
    assert decoder.prunable_parameters() == sum(
        m.weight.numel() for m in decoder.stack.modules() if isinstance(m, nn.Linear)
    )
    assert all(torch.equal(before[key], value) for key, value in state(loaded.model).items())
    with pytest.raises(Refused, match="sliced already"):
        fold_norms(decoder, model)


def test_norms_behind_blocks_forbid_rotations() -> None:
    loaded = build("gemma3")
    with pytest.raises(Refused, match="normalises what its blocks add"):
        fold_norms(decoder_of(loaded), loaded.model)
