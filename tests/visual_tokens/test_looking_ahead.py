"""Rows and keys of a layer that has not run yet, against the eager attention of that layer once it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import ARCHITECTURES, load, picture

from zoo.engines.probes import Seen, tap_attention
from zoo.engines.reading_ahead import read_ahead, without_hooks
from zoo.engines.reductions import Keep, Merge
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.engines.upcoming import look_ahead, rotated, upcoming_keys
from zoo.families.visual_tokens import keep
from zoo.models import LoadedModel

LAYER = 2


def inputs(loaded: LoadedModel) -> dict[str, Any]:
    texts = ["<image>\nWhat is it?", "Look at this: <image> Is it on the left?", "<image>?"]
    images = [picture(0, 70, 50), picture(1, 40, 110), picture(2, 48, 48)]
    return dict(loaded.processor(text=texts, images=images, return_tensors="pt", padding=True))


def every_second(view: View) -> Keep:
    return keep(torch.arange(0, len(view.tokens), 2))


def everything(view: View) -> Keep:
    return keep(torch.arange(len(view.tokens)))


@torch.no_grad()
def run(loaded: LoadedModel, data: dict[str, Any], stages: list[Stage], **options: Any) -> Any:
    reducer = TokenReducer(loaded.anatomy, stages, "keep", "test")
    try:
        return loaded.model(**data, **options)
    finally:
        reducer.close()


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_and_keys_are_those_of_the_coming_layer(name: str, policy: Any) -> None:
    """Behind a stage that has removed tokens, in a padded batch, at the position ids that this stage has left."""
    loaded = load(name)
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    data = inputs(loaded)
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    keys: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(view: View) -> Keep:
        asked = torch.cat((view.question, view.last)).unique()
        rows.append((asked, look_ahead(view, decoder, asked).attention(LAYER, asked)))
        own = upcoming_keys(decoder.layers[LAYER], view.tokens)
        keys.append((view.index, rotated(decoder, own, view.positions[..., view.index])))
        return everything(view)

    first = Stage(-1, every_second, positions=policy)
    seen: list[Seen] = []
    detach = tap_attention(decoder.layers[LAYER].attention.module, seen.append)
    run(loaded, data, [first, Stage(LAYER, look)])
    detach()
    eager = load(name)
    eager.model.set_attn_implementation("eager")
    full = run(eager, data, [first], output_attentions=True).attentions[LAYER]
    assert len(rows) == 3
    for sample, (asked, found) in enumerate(rows):
        width = found.shape[-1]
        assert (found - full[sample, :, asked, :width]).abs().max() < 1e-5
        places, turned = keys[sample]
        torch.testing.assert_close(turned, seen[0].key[sample, :, places], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reading_ahead_is_what_the_layers_read(name: str) -> None:
    """The whole prompt read on the side, deep-stacked features included, is the prompt that the model reads."""
    loaded = load(name)
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    data = inputs(loaded)
    reader = [without_hooks(layer.module) for layer in decoder.layers[:LAYER]]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(view: View) -> Keep:
        whole = torch.ones(len(view.tokens), dtype=torch.bool)
        found.append((view.index, read_ahead(view, whole, decoder, reader, LAYER).softmax(-1)))
        return everything(view)

    run(loaded, data, [Stage(-1, read)])
    eager = load(name)
    eager.model.set_attn_implementation("eager")
    with torch.no_grad():
        full = eager.model(**data, output_attentions=True).attentions[LAYER]
    for sample, (places, row) in enumerate(found):
        expected = full[sample, :, -1, places]
        assert (row - expected / expected.sum(-1, keepdim=True)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen3-vl"])
def test_keys_that_weigh_more_are_looked_at_more(name: str) -> None:
    """Looking ahead knows the weights that an earlier stage has given to keys."""
    loaded = load(name)
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    data = inputs(loaded)
    rows: list[torch.Tensor] = []

    def pairs(view: View) -> Merge:
        number = torch.arange(len(view.tokens)).unsqueeze(0)
        return Merge(number // 2, torch.ones(number.shape), number[:, ::2])

    def look(view: View) -> Keep:
        assert view.weight is not None
        assert view.weight.max() == 2
        rows.append(look_ahead(view, decoder, view.last).attention(LAYER, view.last)[:, 0])
        return everything(view)

    first = Stage(1, pairs, weigh=True)
    run(loaded, data, [first, Stage(LAYER, look)])
    eager = load(name)
    eager.model.set_attn_implementation("eager")
    full = run(eager, data, [first], output_attentions=True).attentions[LAYER]
    plain = run(eager, data, [Stage(1, pairs)], output_attentions=True).attentions[LAYER]
    for sample, row in enumerate(rows):
        assert (row - full[sample, :, -1]).abs().max() < 1e-5
        assert (row - plain[sample, :, -1]).abs().max() > 1e-4
