"""DToP: who is finalised, the canvas, and a segmenter whose sequence gets shorter while its map stays whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import footprint, lengths, pixels, tiny

import zoo
from zoo.errors import BadInput, BadParameter, Refused
from zoo.methods.encoder_tokens._dtop_canvas import AppliedSegmentation, paint
from zoo.methods.encoder_tokens.dtop import finalised
from zoo.models import LoadedModel
from zoo.models.segvit import MaskPrediction

SURE: dict[str, Any] = {"threshold": 0.2, "protect": 1}


@torch.no_grad()
def segment(loaded: LoadedModel, x: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = loaded.model(pixel_values=x).logits
    return logits


def reference(scores: torch.Tensor, threshold: float, protect: int) -> list[bool]:
    """One image ``[K, N]``, token by token."""
    best = [max(column) for column in scores.T.tolist()]
    label = scores.argmax(0).tolist()
    done = [value > threshold for value in best]
    for number in range(len(scores)):
        mine = sorted((i for i in range(len(best)) if done[i] and label[i] == number), key=lambda i: -best[i])
        for i in mine[:protect]:
            done[i] = False
    return done


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("protect", [1, 3, 50])
def test_the_surest_of_each_class_stay(seed: int, protect: int) -> None:
    scores = torch.rand(2, 4, 30, generator=torch.Generator().manual_seed(seed))
    done = finalised(scores, None, 0.7, protect)
    assert done.tolist() == [reference(image, 0.7, protect) for image in scores]


def test_padding_is_never_finalised_and_protects_nobody() -> None:
    scores = torch.full((1, 2, 4), 0.1)
    scores[0, 0] = torch.tensor([0.99, 0.8, 0.9, 0.7])
    valid = torch.tensor([[False, True, True, True]])
    assert finalised(scores, valid, 0.5, 1).tolist() == [[False, True, False, True]]


def test_the_canvas_keeps_what_earlier_heads_said() -> None:
    memory: dict[str, Any] = {}
    classes = torch.zeros(1, 2, 2)
    paint(memory, MaskPrediction(classes, torch.ones(1, 2, 5)), None)
    memory["places"] = torch.tensor([[1, 4, 4]])
    valid = torch.tensor([[True, True, False]])
    masks = torch.tensor([[[2.0, 3.0, 9.0], [4.0, 5.0, 9.0]]])
    whole = paint(memory, MaskPrediction(classes, masks), valid)
    assert whole.masks.tolist() == [[[1, 2, 1, 1, 3], [1, 4, 1, 1, 5]]]


def test_tokens_leave_and_the_map_stays_whole() -> None:
    loaded = tiny("segvit")
    before = footprint(loaded.model)
    dense = segment(loaded, pixels(1))
    with zoo.method("dtop", **SURE).apply(loaded) as applied, lengths(loaded) as seen:
        short = segment(loaded, pixels(1))
        assert seen["attention"] == seen["mlp"] == applied.tokens_per_block
    assert seen["mlp"][1] == 36 > seen["mlp"][2] >= seen["mlp"][3]
    assert short.shape == dense.shape == (1, 6, 48, 48)
    assert not torch.equal(short, dense)
    assert footprint(loaded.model) == before
    assert torch.equal(segment(loaded, pixels(1)), dense)


def test_a_batch_equals_its_images_one_by_one() -> None:
    loaded = tiny("segvit")
    x = pixels(3, seed=4)
    with zoo.method("dtop", **SURE).apply(loaded) as applied:
        together = segment(loaded, x)
        alone, counts = [], []
        for image in x:
            alone.append(segment(loaded, image[None]))
            counts.append(applied.tokens_per_block[-1])
    assert len(set(counts)) > 1, "the images should keep different numbers of tokens"
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_finalised_tokens_keep_the_logits_of_the_head_that_finalised_them() -> None:
    loaded = tiny("segvit")
    method = zoo.method("dtop", **SURE)
    with method.apply(loaded) as applied:
        assert isinstance(applied, AppliedSegmentation)
        segment(loaded, pixels(1))
        first, second, last = (prediction.masks[0] for prediction in applied.said)
    same = (first == second).all(0)
    assert 0 < int(same.sum()) < 36
    assert torch.equal(last[:, same], first[:, same])


def test_a_threshold_of_one_touches_nothing() -> None:
    loaded = tiny("segvit")
    dense = segment(loaded, pixels())
    with zoo.method("dtop", threshold=1).apply(loaded) as applied:
        assert torch.equal(segment(loaded, pixels()), dense)
        assert applied.report.kept_ratio == 1


def test_odd_sizes_half_precision_and_repeated_inputs() -> None:
    loaded = tiny("segvit")
    loaded.model.to(torch.bfloat16)
    x = pixels(2).to(torch.bfloat16)
    with zoo.method("dtop", **SURE).apply(loaded):
        once = segment(loaded, x)
        segment(loaded, pixels(1, seed=7).to(torch.bfloat16))
        assert torch.equal(segment(loaded, x), once)
    assert once.dtype == torch.bfloat16


def test_an_exception_half_way_leaves_the_model_as_it_was() -> None:
    loaded = tiny("segvit")
    dense, before = segment(loaded, pixels()), footprint(loaded.model)

    def fail(*_: Any) -> None:
        raise RuntimeError("half way")

    handle = loaded.model.blocks[3].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError), zoo.method("dtop", **SURE).apply(loaded):
        segment(loaded, pixels())
    handle.remove()
    assert footprint(loaded.model) == before
    assert torch.equal(segment(loaded, pixels()), dense)


def test_refusals() -> None:
    with pytest.raises(Refused, match="zoo train dtop"):
        zoo.method("dtop").apply(tiny("vit"))
    with pytest.raises(BadParameter, match="full size"):
        zoo.method("dtop", restore=True)
    loaded = tiny("segvit")
    with zoo.method("tome", r=4).apply(loaded), pytest.raises(BadInput, match="restore=true"):
        segment(loaded, pixels(1))
    with zoo.method("tome", r=4, restore=True).apply(loaded):
        assert segment(loaded, pixels(1)).shape == (1, 6, 48, 48)
