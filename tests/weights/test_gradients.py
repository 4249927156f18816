"""Summed gradients against plain autograd."""

from __future__ import annotations

import pytest
import torch
from architectures import MODELS, build, decoder_of, ids

from zoo.engines.gradients import language_model_loss, sum_gradients
from zoo.errors import RunFailed
from zoo.models import LoadedModel


def plain(loaded: LoadedModel, windows: torch.Tensor, name: str) -> torch.Tensor:
    """Gradient of the mean loss by one parameter."""
    parameter = dict(loaded.model.named_parameters())[name]
    (gradient,) = torch.autograd.grad(loaded.model(input_ids=windows, labels=windows).loss, [parameter])
    return gradient


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gemma3"])
def test_means_and_mean_squares_are_those_of_autograd(name: str) -> None:
    loaded, windows = build(name), ids(5, 12)
    layer = decoder_of(loaded).layers[1]
    parts = [layer.attention.value, layer.mlp.up, layer.mlp.down]
    # Batches of three and two: every window weighs the same.
    together = sum_gradients(
        loaded.model, parts, windows.split(3), lambda batch: language_model_loss(loaded.model, batch)
    )
    alone = sum_gradients(
        loaded.model,
        parts,
        windows.split(1),
        lambda batch: language_model_loss(loaded.model, batch),
        squares=True,
    )
    names = {id(value): name for name, value in loaded.model.named_parameters()}
    for part in parts:
        rows = slice(*part.rows) if part.rows else slice(None)
        expected = plain(loaded, windows, names[id(part.linear.weight)])[rows]
        torch.testing.assert_close(together.mean(part), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(alone.mean(part), expected, rtol=1e-4, atol=1e-7)
        each = [plain(loaded, row[None], names[id(part.linear.weight)])[rows] for row in windows]
        squares = torch.stack(each).square().mean(0)
        torch.testing.assert_close(alone.mean_square(part), squares, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_nothing_is_left_behind(name: str) -> None:
    loaded = build(name)
    model = loaded.model
    model.train()
    frozen = decoder_of(loaded).layers[0].mlp.up.linear.weight.requires_grad_(False)
    decoder_of(loaded).norm.weight.grad = torch.ones_like(decoder_of(loaded).norm.weight)
    parts = [part for layer in decoder_of(loaded).layers for part in layer.linears]
    with torch.no_grad():
        sums = sum_gradients(model, parts, ids(2).split(1), lambda batch: language_model_loss(model, batch))
    assert float(sums.mean(parts[-1]).abs().sum()) > 0
    assert not frozen.requires_grad
    assert model.training
    left = {name for name, value in model.named_parameters() if value.grad is not None}
    assert left == {
        name for name, value in model.named_parameters() if value is decoder_of(loaded).norm.weight
    }
    assert not any(value._post_accumulate_grad_hooks for value in model.parameters())


def test_a_loss_that_is_not_finite_stops_and_cleans_up() -> None:
    loaded = build("llama-gqa")
    part = decoder_of(loaded).layers[0].mlp.up

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return language_model_loss(loaded.model, batch) * float("nan")

    with pytest.raises(RunFailed, match="NaN or infinite"):
        sum_gradients(loaded.model, [part], ids(2).split(1), loss)
    assert all(value.requires_grad and value.grad is None for value in loaded.model.parameters())
