"""A narrower residual stream: rotate it, drop channels, and lead from one rotation to the next on the shortcuts.

An RMS norm without weights commutes with rotations, so what a layer reads and writes may be expressed in another basis
at every point of the stream (Ashkboos et al., SliceGPT, arXiv 2401.15024, section 3). ``fold_norms`` makes the norms
weightless; ``slice_layer`` and ``slice_ends`` then express each part in the bases it is given. A basis is a matrix
``[D, d]`` with orthonormal columns: ``x @ basis`` are the coordinates in which the smaller model keeps ``x``. With
``d = D`` everywhere the model computes what it did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zoo.errors import Refused
from zoo.models.anatomy import Decoder, DecoderLayer, LinearPart
from zoo.models.modeling_pruned import add_shortcuts, divide_by


def new_linear(weight: torch.Tensor, like: nn.Linear, bias: torch.Tensor | None = None) -> nn.Linear:
    """A linear layer with this weight ``[out, in]`` and bias, on the device and in the type of another."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(like.weight), like.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(like.weight), like.weight.requires_grad)
    return linear.train(like.training)


def check_sliceable(decoder: Decoder) -> None:
    """Raise ``Refused`` when the residual stream cannot be rotated: blocks are normalised again, or it was sliced."""
    for layer in decoder.layers:
        if layer.attention_norm is not None:
            raise Refused(
                "the residual stream cannot be rotated: this model normalises what its blocks add to it"
            )
        if layer.attention_shortcut is not None:
            raise Refused("the residual stream of this model is sliced already; take the dense model")


def _linears(parts: Iterable[LinearPart]) -> list[LinearPart]:
    """One part for each linear layer that ``parts`` are rows of."""
    return list({(id(part.owner), part.name): part for part in parts}.values())


@torch.no_grad()
def fold_norms(decoder: Decoder, head: Any) -> None:
    """Multiply the weight of every norm into the linears that read it, and leave ones.

    Args:
        decoder: its layers and final norm change; the function it computes does not.
        head: the module that owns ``lm_head``, which is untied from the embedding.

    Raises:
        Refused: see ``check_sliceable``.
    """
    check_sliceable(decoder)
    for layer in decoder.layers:
        groups = layer.by_input
        for name, norm in (("attention", layer.input_norm), ("mlp", layer.post_norm)):
            for part in _linears(groups.get(name, ())):
                _fold(norm, part)
            if name in groups:
                _set_weight(norm, torch.ones_like(_weight(norm)))
    _fold(decoder.norm, LinearPart(head, "lm_head"))
    _set_weight(decoder.norm, torch.ones_like(_weight(decoder.norm)))
    head.config.tie_word_embeddings = False


def _weight(norm: Any) -> torch.Tensor:
    weight: torch.Tensor = norm.weight
    return weight


def _set_weight(norm: Any, weight: torch.Tensor) -> None:
    norm.weight = nn.Parameter(weight.to(norm.weight), norm.weight.requires_grad)


def _fold(norm: nn.Module, part: LinearPart) -> None:
    old = part.linear
    setattr(part.owner, part.name, new_linear(old.weight.float() * _weight(norm).float(), old, old.bias))


def _read(part: LinearPart, basis: torch.Tensor) -> None:
    """Let a linear read coordinates instead of the residual stream: ``W <- W Q``."""
    old = part.linear
    setattr(part.owner, part.name, new_linear(old.weight.to(basis) @ basis, old, old.bias))


def _write(part: LinearPart, basis: torch.Tensor) -> None:
    """Let a linear write coordinates: ``W <- Q^T W``, ``b <- Q^T b``."""
    old = part.linear
    bias = None if old.bias is None else basis.T @ old.bias.to(basis)
    setattr(part.owner, part.name, new_linear(basis.T @ old.weight.to(basis), old, bias))


def _narrow(norm: Any, basis: torch.Tensor) -> None:
    """A weightless norm on coordinates that still divides by the root mean square over all ``D`` channels."""
    original, width = basis.shape
    _set_weight(norm, torch.full((width,), (original / width) ** 0.5))
    divide_by(norm, original)


@torch.no_grad()
def slice_layer(
    layer: DecoderLayer, entering: torch.Tensor, middle: torch.Tensor, leaving: torch.Tensor
) -> None:
    """Express one layer in the bases of its input, of what its MLP reads, and of its output.

    Args:
        layer: with weightless norms; its modules change.
        entering, middle, leaving: bases ``[D, d]``, float32 or float64, on the layer's device.
    """
    groups, like = layer.by_input, layer.linears[0].linear
    for name, norm, basis in (
        ("attention", layer.input_norm, entering),
        ("mlp", layer.post_norm, middle),
    ):
        for part in _linears(groups.get(name, ())):
            _read(part, basis)
        if name in groups:
            _narrow(norm, basis)
    for name, basis in (("output", middle), ("down", leaving)):
        for part in groups.get(name, ()):
            _write(part, basis)
    add_shortcuts(
        layer.module,
        new_linear(middle.T @ entering, like),
        new_linear(leaving.T @ middle, like),
    )


@torch.no_grad()
def slice_ends(decoder: Decoder, head: Any, first: torch.Tensor, last: torch.Tensor) -> None:
    """Express embedding, final norm and LM head in the bases of the first layer's input and the last one's output.

    Args:
        decoder: after ``fold_norms``.
        head: the module that owns ``lm_head``.
        first, last: bases ``[D, d]``; ``last`` may be square, which leaves the head its width.
    """
    embed, config = decoder.embed, decoder.config
    weight = embed.weight.to(first) @ first
    embed.weight = nn.Parameter(weight.to(embed.weight), embed.weight.requires_grad)
    embed.embedding_dim = first.shape[1]
    _narrow(decoder.norm, last)
    _read(LinearPart(head, "lm_head"), last)
    config.original_hidden_size, config.hidden_size = first.shape[0], first.shape[1]
    config.output_size = last.shape[1]
