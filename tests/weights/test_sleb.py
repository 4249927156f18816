"""SLEB: the search against models that are really silenced, planted layers, barriers."""

from __future__ import annotations

import pytest
import torch
from depth import decoder_of, ids, loaded, scale_layer, silenced, slow_losses

from zoo.engines.removal_search import losses_without, whole_layers
from zoo.engines.surgery import Block
from zoo.errors import BadInput, BadParameter, RunFailed
from zoo.methods.weights.sleb import Sleb


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_the_search_is_that_of_a_slow_reference(name: str) -> None:
    model, windows = loaded(name, num_hidden_layers=6), ids()
    removals = Sleb(layers=3).search(decoder_of(model), windows, batch=2)

    left = list(range(6))
    for removal in removals:
        tried = {}
        for index in left[1:-1]:
            gone = (set(range(6)) - set(left)) | {index}
            tried[index] = float(slow_losses(silenced(model.model, gone, gone), windows).sum() * 16)
        assert [block.index for block in removal.scores] == list(tried)
        assert list(removal.scores.values()) == pytest.approx(list(tried.values()), rel=1e-5)
        assert removal.block.index == min(tried, key=tried.__getitem__)
        left.remove(removal.block.index)


def test_sharing_what_runs_below_changes_no_bit() -> None:
    model, windows = loaded(), ids()
    decoder = decoder_of(model)
    layers = whole_layers(decoder)
    together = losses_without(decoder, layers, layers, windows)
    alone = torch.cat([losses_without(decoder, layers, [layer], windows) for layer in layers])
    assert torch.equal(together, alone)


def test_a_useless_layer_leaves_and_an_important_one_stays() -> None:
    model = loaded(num_hidden_layers=6)
    # What layer 3 adds outweighs everything before it: the model's own continuations depend on it.
    scale_layer(model, 3, 6.0)
    scale_layer(model, 4, 0.0)
    with torch.no_grad():
        windows = model.model.generate(ids(6, 4), max_new_tokens=20, do_sample=False)
    removals = Sleb(layers=3).search(decoder_of(model), windows)
    assert removals[0].block == Block(4)
    assert Block(3) not in [removal.block for removal in removals]


def test_barriers_protect_the_ends_of_what_is_left() -> None:
    decoder = decoder_of(loaded(num_hidden_layers=6))
    removals = Sleb(layers=2, early_barrier=2, latter_barrier=2).search(decoder, ids())
    assert {removal.block.index for removal in removals} == {2, 3}
    with pytest.raises(BadParameter, match="only 2"):
        Sleb(layers=3, early_barrier=2, latter_barrier=2).search(decoder, ids())


def test_of_equal_losses_the_first_layer_leaves() -> None:
    model = loaded(num_hidden_layers=6)
    for index in (2, 3):
        scale_layer(model, index, 0.0)
    assert Sleb(layers=1).search(decoder_of(model), ids())[0].block == Block(2)


def test_the_model_is_left_as_it_was() -> None:
    model, windows = loaded(), ids()
    decoder = decoder_of(model)
    before = slow_losses(model.model, windows)
    decoder.layers[0].module.train()
    Sleb(layers=1).search(decoder, windows)
    assert decoder.layers[0].module.training
    model.model.eval()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sleb(layers=1).search(decoder, windows, progress=stop)
    assert torch.equal(slow_losses(model.model, windows), before)


def test_progress_counts_up_to_its_total() -> None:
    steps: list[tuple[int, int]] = []
    Sleb(layers=2).search(
        decoder_of(loaded()), ids(5), batch=2, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(number, 6) for number in range(1, 7)]


def test_what_cannot_be_searched_is_said() -> None:
    model = loaded()
    with pytest.raises(BadInput, match="two tokens"):
        Sleb(layers=1).apply(model, calibration=ids(4, 1))
    with torch.no_grad():
        model.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="finite"):
        Sleb(layers=1).apply(model, calibration=ids())


def test_windows_bounds_the_text_that_is_tried() -> None:
    model = loaded()
    text = torch.cat([ids(3), torch.full((3, 16), 7)])
    applied = Sleb(layers=2, windows=3).apply(model, calibration=text)
    same = Sleb(layers=2).apply(model, calibration=text[:3])
    assert applied.report.facts["order of removal"] == same.report.facts["order of removal"]
