"""The pass of SliceGPT through a decoder: principal components in front of every block, and slicing as it goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zoo.engines.second_order import SecondMoment, damped
from zoo.engines.slicing import fold_norms, slice_ends, slice_layer
from zoo.engines.statistics import Progress
from zoo.engines.stepping import (
    evaluating,
    forward_replaced,
    layer_arguments,
    moved,
    run_layer,
    to_device,
)
from zoo.errors import RunFailed
from zoo.models.anatomy import Decoder, DecoderLayer

DAMPING = 0.01
"""Added to the diagonal of ``X^T X``, relative to its mean."""


def second_moment(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """``X^T X [channels, channels]`` float64 over all tokens of ``batches``, each ``[tokens, channels]``."""
    moment = SecondMoment()
    for tokens in batches:
        moment.update(tokens.double())
    return moment.total


def principal_components(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues ``[D]`` of the damped ``moment [D, D]``, highest first, and eigenvectors in columns ``[D, D]``.

    Raises:
        RunFailed: the moment is not finite.
    """
    if not bool(moment.isfinite().all()):
        raise RunFailed("the model's activations are NaN or infinite; load it in float32 or bfloat16")
    values, vectors = torch.linalg.eigh(damped(moment, DAMPING))
    return values.flip(0), vectors.flip(1)


def first_components(moment: torch.Tensor, width: int, mixing: torch.Generator | None) -> torch.Tensor:
    """The first ``width`` principal directions ``[D, width]``, float64, mixed at random if there is a generator."""
    _, directions = principal_components(moment)
    basis = directions[:, :width]
    if mixing is None:
        return basis
    noise = torch.randn(width, width, generator=mixing, dtype=torch.float64)
    return basis @ torch.linalg.qr(noise)[0].to(basis.device)


def centre_embeddings(decoder: Decoder) -> None:
    """Subtract the mean over channels from each embedding vector."""
    weight = decoder.embed.weight.detach()
    centred = weight.double() - weight.double().mean(1, keepdim=True)
    decoder.embed.weight = nn.Parameter(centred.to(weight), decoder.embed.weight.requires_grad)


@torch.no_grad()
def rotate_and_slice(
    decoder: Decoder,
    head: Any,
    windows: torch.Tensor,
    width: int,
    *,
    head_width: int,
    mixing: torch.Generator | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Give the residual stream fewer channels; each layer is measured on what the sliced ones before it put out.

    Args:
        decoder: its modules change.
        head: the module that owns ``lm_head``.
        windows: calibration ids ``[windows, tokens]``.
        width: channels of the stream.
        head_width: channels that the LM head reads.
        mixing: of a random orientation, on the CPU; ``None`` leaves the components in order.
        batch: windows run at once. It changes speed and memory only.
        device: where layers run, one at a time; ``None`` for where the model is.
        progress: called after each layer.

    Raises:
        Refused: see ``zoo.engines.slicing.check_sliceable``.
        RunFailed: NaN or infinite activations.
    """
    fold_norms(decoder, head)
    home = decoder.embed.weight.device
    target = home if device is None else torch.device(device)
    with evaluating(decoder.module):
        calls = [layer_arguments(decoder, ids) for ids in windows.to(home).split(batch)]
        # The stream in the coordinates of the dense model, whatever was cut of it before.
        stream = [hidden for hidden, _ in calls]

        def basis_here(channels: int) -> torch.Tensor:
            tokens = (hidden.to(target).flatten(0, 1) for hidden in stream)
            return first_components(second_moment(tokens), channels, mixing)

        first = entering = basis_here(width)
        for index, layer in enumerate(decoder.layers):
            with moved(layer.module, target):
                for place, (_, arguments) in enumerate(calls):
                    cut = within(stream[place].to(target), entering)
                    stream[place] = attended(layer, cut, to_device(arguments[index], target)).to(home)
                middle = basis_here(width)
                for place, hidden in enumerate(stream):
                    cut = within(hidden.to(target), middle)
                    stream[place] = (cut + layer.mlp.module(layer.post_norm(cut))).to(home)
                last = index == len(decoder.layers) - 1
                leaving = basis_here(head_width if last else width)
                slice_layer(layer, entering, middle, leaving)
            entering = leaving
            if progress is not None:
                progress(index + 1, len(decoder.layers))
    slice_ends(decoder, head, first.to(home), entering.to(home))


def within(hidden: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What is left of ``hidden [..., D]`` in the span of ``basis [D, d]``, in the coordinates of ``hidden``."""
    basis = basis.float()
    return (hidden.float() @ basis @ basis.T).to(hidden)


def attended(layer: DecoderLayer, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """The residual stream ``[batch, tokens, D]`` behind the attention of ``layer``."""
    with forward_replaced(layer.mlp.module, torch.zeros_like):
        return run_layer(layer.module, hidden, arguments)
