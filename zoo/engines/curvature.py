"""Gradient of the next-token loss by weights of a decoder, and products with its Hessian.

Nothing is left behind: no ``grad`` is stored, and frozen parameters are frozen again. Both functions take:

- decoder: with an LM head; it runs in evaluation mode.
- parameters: what to differentiate by.
- windows: ids ``[windows, tokens]`` on the model's device. The loss is the mean over windows of their mean loss.
- batch: windows per pass, which changes speed and memory only.

Results are in float32, a tensor per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.engines.removal_search import next_token_losses
from zoo.engines.stepping import evaluating
from zoo.models.anatomy import Decoder


def loss_gradient(
    decoder: Decoder, parameters: Sequence[nn.Parameter], windows: torch.Tensor, batch: int
) -> list[torch.Tensor]:
    """``g = dL / d parameters``."""
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    with evaluating(decoder.module), _learning(parameters):
        for ids in windows.split(batch):
            loss = _loss(decoder, ids) / len(windows)
            _add(total, torch.autograd.grad(loss, parameters))
    return total


def hessian_product(
    decoder: Decoder,
    parameters: Sequence[nn.Parameter],
    windows: torch.Tensor,
    batch: int,
    direction: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """``H d``, the second derivatives of the loss by ``parameters`` times a tensor ``d`` of the shape of each.

    Two backward passes; the matrix is never formed. Fused attention cannot be differentiated twice, so torch's plain
    kernel takes its place meanwhile.
    """
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    with evaluating(decoder.module), _learning(parameters), sdpa_kernel(SDPBackend.MATH):
        for ids in windows.split(batch):
            loss = _loss(decoder, ids) / len(windows)
            slopes = torch.autograd.grad(loss, parameters, create_graph=True)
            along = torch.stack([(g * d).sum() for g, d in zip(slopes, direction, strict=True)]).sum()
            _add(total, torch.autograd.grad(along, parameters))
    return total


def _loss(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Sum over the windows ``ids [batch, tokens]`` of their mean losses, 0-d."""
    hidden = decoder.module(input_ids=ids, use_cache=False).last_hidden_state
    return next_token_losses(decoder, hidden, ids).sum()


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach ``parameters`` for a while."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def _add(total: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
    for whole, part in zip(total, parts, strict=True):
        whole += part.detach()
