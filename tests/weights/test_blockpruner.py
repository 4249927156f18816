"""BlockPruner: the search against models whose halves are really silenced, planted blocks, what may leave."""

from __future__ import annotations

import math

import pytest
import torch
from depth import decoder_of, ids, loaded, scale_layer, silenced, slow_losses

from zoo.engines.surgery import Block
from zoo.errors import BadParameter
from zoo.methods.weights.blockpruner import BlockPruner


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_the_search_is_that_of_a_slow_reference(name: str) -> None:
    model, windows = loaded(name, num_hidden_layers=4), ids()
    removals = BlockPruner(layers=4).search(decoder_of(model), windows, batch=2)

    gone: dict[str, set[int]] = {"attention": set(), "mlp": set()}
    for removal in removals:
        tried = {}
        for part in ("attention", "mlp"):
            for index in set(range(4)) - gone[part]:
                without = {kind: set(found) for kind, found in gone.items()}
                without[part].add(index)
                losses = slow_losses(silenced(model.model, **without), windows)
                tried[Block(index, part)] = math.exp(float(losses.mean()))
        assert list(removal.scores) == list(tried)
        assert list(removal.scores.values()) == pytest.approx(list(tried.values()), rel=1e-5)
        assert removal.block == min(tried, key=tried.__getitem__)
        gone[removal.block.part].add(removal.block.index)


def test_the_useless_half_of_a_layer_leaves_and_the_other_one_stays() -> None:
    model = loaded()
    scale_layer(model, 2, 6.0, ["down"])
    scale_layer(model, 2, 0.0, ["o"])
    with torch.no_grad():
        windows = model.model.generate(ids(6, 4), max_new_tokens=20, do_sample=False)
    removals = BlockPruner(layers=3).search(decoder_of(model), windows)
    assert removals[0].block == Block(2, "attention")
    assert Block(2, "mlp") not in [removal.block for removal in removals]


@pytest.mark.parametrize(("block_type", "part"), [("mha", "attention"), ("mlp", "mlp")])
def test_one_kind_of_block_only(block_type: str, part: str) -> None:
    removals = BlockPruner(layers=3, block_type=block_type).search(decoder_of(loaded()), ids())
    assert {removal.block.part for removal in removals} == {part}


def test_the_last_attention_stays() -> None:
    decoder = decoder_of(loaded())
    with pytest.raises(BadParameter, match="only 3"):
        BlockPruner(layers=4, block_type="mha").search(decoder, ids())
    removals = BlockPruner(layers=7).search(decoder, ids())
    assert sum(removal.block.part == "attention" for removal in removals) == 3


def test_what_was_removed_before_is_no_candidate_again() -> None:
    once = BlockPruner(layers=2).apply(loaded(), calibration=ids())
    decoder = decoder_of(once.loaded)
    total = sum(bool(layer.attention.heads) + bool(layer.mlp.width) for layer in decoder.layers)
    assert total == 6
    scores = BlockPruner(layers=1).search(decoder, ids())[0].scores
    assert len(scores) == 6


def test_two_removals_in_a_row_are_those_of_one_search() -> None:
    model, windows = loaded(), ids()
    twice = BlockPruner(layers=2).apply(
        BlockPruner(layers=2).apply(model, calibration=windows).loaded, calibration=windows
    )
    once = BlockPruner(layers=4).apply(model, calibration=windows)
    with torch.no_grad():
        assert torch.equal(twice(input_ids=windows).logits, once(input_ids=windows).logits)


def test_half_layers_take_their_weights_with_them() -> None:
    model = loaded()
    layers = decoder_of(model).layers
    applied = BlockPruner(layers=3).apply(model, calibration=ids())
    blocks = applied.report.facts["order of removal"].split(", ")  # type: ignore[union-attr]
    sizes = {
        "attention": sum(part.weight.numel() for part in layers[0].by_input["attention"])
        + layers[0].attention.output.weight.numel(),
        "mlp": 3 * layers[0].mlp.up.weight.numel(),
    }
    removed = applied.report.total - applied.report.kept
    assert removed == sum(sizes[block.split()[0]] for block in blocks)
