"""SliceGPT: the function is kept where nothing is lost, and the budget, the norms and the files are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import MODELS, build, decoder_of, ids, logits, padded, state

import zoo
from zoo.dialogues import Dialogue
from zoo.errors import BadParameter, Refused
from zoo.methods.weights._slicegpt_rotation import principal_components, second_moment
from zoo.methods.weights.slicegpt import SliceGPT
from zoo.models import LoadedModel
from zoo.models.pruned import refit
from zoo.models.tiny import tiny_model

ROTATABLE = sorted(MODELS.keys() - {"gemma3"})


@torch.no_grad()
def into_first_channels(loaded: LoadedModel, width: int) -> None:
    """Let everything in the residual stream lie in a rotated subspace of ``width`` dimensions."""
    decoder = decoder_of(loaded)
    noise = torch.randn(decoder.hidden_size, width, generator=torch.Generator().manual_seed(5))
    basis = torch.linalg.qr(noise)[0]
    project = basis @ basis.T
    decoder.embed.weight.copy_(decoder.embed.weight @ project)
    for layer in decoder.layers:
        for part in (layer.attention.output, layer.mlp.down):
            part.weight.copy_(project @ part.weight)
            if part.bias is not None:
                part.bias.copy_(project @ part.bias)


@pytest.mark.parametrize("name", ROTATABLE)
def test_components_that_carry_nothing_leave_without_a_trace(name: str) -> None:
    loaded = build(name)
    into_first_channels(loaded, 24)
    before = state(loaded.model)
    applied = SliceGPT(slicing=0.5).apply(loaded, calibration=ids(12, 30))
    assert decoder_of(applied.loaded).hidden_size == 24
    torch.testing.assert_close(
        logits(applied.model, **padded()), logits(loaded.model, **padded()), rtol=0, atol=2e-3
    )
    assert all(torch.equal(value, before[key]) for key, value in state(loaded.model).items())


@pytest.mark.parametrize("orientation", ["random", "pca"])
@pytest.mark.parametrize("slice_head", [False, True])
def test_full_width_is_only_a_rotation(orientation: str, slice_head: bool) -> None:
    loaded = build("llama-bias")
    expected = logits(loaded.model, **padded())
    method = SliceGPT(orientation=orientation, slice_head=slice_head)
    decoder = decoder_of(loaded)
    method.slice_to(48, decoder, loaded.model, ids(), torch.Generator().manual_seed(0))
    refit(loaded.model)
    torch.testing.assert_close(logits(loaded.model, **padded()), expected, rtol=0, atol=1e-4)


def test_the_orientation_changes_weights_and_not_the_function() -> None:
    loaded = build("llama-gqa")
    applied = {
        (orientation, seed): SliceGPT(sparsity=0.1, orientation=orientation).apply(
            loaded, calibration=ids(), seed=seed
        )
        for orientation, seed in (("pca", 0), ("random", 0), ("random", 1))
    }
    first, *others = (logits(one.model, **padded()) for one in applied.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-4)
    keys = [decoder_of(one.loaded).layers[0].attention.key.weight for one in applied.values()]
    assert not torch.allclose(keys[1], keys[2], atol=1e-2)
    energies = [key.square().sum(0) for key in keys]
    # In order of variance channels differ a lot; mixed they are alike.
    assert all(energy.std() < energies[0].std() for energy in energies[1:])


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.5])
def test_sparsity_counts_the_shortcuts(sparsity: float, slice_head: bool) -> None:
    loaded = build("llama-mha")
    method = SliceGPT(sparsity=sparsity, round_to=2, slice_head=slice_head)
    applied = method.apply(loaded, calibration=ids())
    report, dense = applied.report, decoder_of(loaded)
    assert report.kept == decoder_of(applied.loaded).prunable_parameters()
    width = decoder_of(applied.loaded).hidden_size
    assert report.kept == method.weights_at(dense, width)
    assert report.kept <= (1 - sparsity) * report.total < method.weights_at(dense, width + 2)
    assert [bar.kept for bar in report.bars["residual channels"]] == [width] * 3


def test_the_published_ratio_rounds_down() -> None:
    decoder = decoder_of(build("llama-mha"))
    assert SliceGPT(slicing=0.3).width(decoder) == 32  # int(0.7 * 48) = 33
    assert SliceGPT(slicing=0.3, round_to=5).width(decoder) == 30
    with pytest.raises(BadParameter, match="remove less"):
        SliceGPT(slicing=0.9).width(decoder)
    with pytest.raises(BadParameter, match="not both"):
        zoo.method("slicegpt", slicing=0.2, sparsity=0.2)


def test_nothing_to_remove_leaves_every_bit() -> None:
    loaded = build("llama-gqa")
    for method in (SliceGPT(sparsity=0), SliceGPT(slicing=0)):
        applied = method.apply(loaded)
        assert torch.equal(logits(applied.model, **padded()), logits(loaded.model, **padded()))


@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "qwen3", "phi3"])
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    applied = SliceGPT(sparsity=0.15).apply(build(name), calibration=ids())
    applied.save(tmp_path / "small")
    loaded = zoo.load_model(str(tmp_path / "small"))
    assert torch.equal(logits(loaded.model, **padded()), logits(applied.model, **padded()))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for side in ("left", "right"):
        together = applied.model.generate(**padded(side), **options)
        assert torch.equal(loaded.model.generate(**padded(side), **options), together)
    with pytest.raises(Refused, match="sliced already"):
        SliceGPT().apply(loaded, calibration=ids())


def test_batches_change_nothing() -> None:
    found = []
    for batch in (1, 4, 6):
        loaded = build("llama-gqa")
        method = SliceGPT(orientation="pca")
        method.slice_to(32, decoder_of(loaded), loaded.model, ids(), torch.Generator(), batch=batch)
        refit(loaded.model)
        found.append(logits(loaded.model, **padded()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)


def test_half_precision() -> None:
    """The components are found in float64 whatever the model's type."""
    whole, half = (build("llama-gqa", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    into_first_channels(whole, 32)
    half.model.load_state_dict(state(whole.model))
    applied = SliceGPT(slicing=0.3).apply(half, calibration=ids(12, 30))
    assert {parameter.dtype for parameter in applied.model.parameters()} == {torch.bfloat16}
    dense, sliced = (logits(one.model, **padded()).float() for one in (half, applied))
    assert (dense - sliced).norm() < 0.1 * dense.norm()


def test_principal_components_are_ordered_and_not_centred() -> None:
    tokens = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) + 3
    moment = second_moment([tokens[:20], tokens[20:]])
    torch.testing.assert_close(moment, tokens.double().T @ tokens.double(), rtol=1e-12, atol=1e-12)
    values, vectors = principal_components(moment)
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert abs(float(vectors[:, 0].sum())) > 2.3  # along the mean: six times 1 / sqrt(6)


def test_recovery_trains_adapters_beside_the_shortcuts(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, processor = tiny_model("tiny-llama")
    texts = [
        f"the {word} sat on the mat and looked at the {word}" for word in ("cat", "dog", "cow", "hen", "fox")
    ]
    trained = zoo.train(
        "slicegpt",
        LoadedModel(model, processor, "tiny-llama"),
        [Dialogue("", text) for text in texts * 2],
        output=tmp_path / "out",
        recipe={"steps": 10, "learning_rate": 0.02, "batch": 4},
        calibration=texts * 60,
    )
    assert trained.record.after["held-out perplexity"] < 0.9 * trained.record.before["held-out perplexity"]
    decoder = decoder_of(zoo.load_model(str(tmp_path / "out" / "model")))
    assert decoder.hidden_size < 64
    assert decoder.layers[0].attention_shortcut is not None


def test_what_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(Refused, match="norms behind its blocks"):
        SliceGPT().apply(build("gemma3"), calibration=ids())
    model, processor = tiny_model("tiny-llava")
    with pytest.raises(Refused, match="on its own"):
        SliceGPT().apply(LoadedModel(model, processor, "tiny-llava"), calibration=ids())
