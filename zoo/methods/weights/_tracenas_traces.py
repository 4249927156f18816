"""Gradient traces: the gradients of a decoder's blocks, and how well those of a smaller one inside it go along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from zoo.engines.curvature import loss_gradient
from zoo.engines.removal_search import half_layers, silent_attention, silent_mlp
from zoo.engines.surgery import Block, channels_of
from zoo.errors import RunFailed
from zoo.models.anatomy import Decoder


@contextmanager
def narrowed(decoder: Decoder, masks: Mapping[Block, torch.Tensor | None]) -> Iterator[None]:
    """Let ``decoder`` compute for a while what it would with narrower blocks, at full shapes.

    Args:
        decoder: its weights stay as they are.
        masks: for attention and feed-forward blocks, the heads or channels that count, or ``None`` for a block that is
            bypassed. Gradients of what does not count are zero.
    """
    with ExitStack() as undo:
        for block, mask in masks.items():
            layer = decoder.layers[block.index]
            attention = block.part == "attention"
            if mask is None:
                undo.enter_context(silent_attention(layer) if attention else silent_mlp(layer))
                continue
            channels = channels_of(mask, layer.attention.head_dim) if attention else mask
            if bool(channels.all()):
                continue
            linear = (layer.attention.output if attention else layer.mlp.down).linear

            def hide(_: nn.Module, inputs: tuple[torch.Tensor, ...], kept: torch.Tensor = channels) -> Any:
                return (inputs[0] * kept.to(inputs[0]),)

            undo.callback(linear.register_forward_pre_hook(hide).remove)
        yield


def correlation(found: Sequence[torch.Tensor], base: Sequence[torch.Tensor], zeros: int = 0) -> float:
    """Product of two standardised vectors divided by their length: Pearson's correlation times ``(n - 1) / n``.

    A vector without any deviation has no direction: 0.

    Args:
        found, base: pieces of the two vectors, of the same shapes.
        zeros: entries that are 0 in both, besides.
    """
    count = zeros + sum(piece.numel() for piece in found)
    sums = torch.zeros(5, dtype=torch.float64)
    for x, piece in zip(found, base, strict=True):
        y = piece.to(x)
        sums += torch.stack([v.sum(dtype=torch.float64) for v in (x, y, x * x, y * y, x * y)]).cpu()
    x, y, xx, yy, xy = sums.tolist()
    deviations = (xx - x * x / count) * (yy - y * y / count)
    if deviations <= 0 or count < 2:
        return 0.0
    return (xy - x * y / count) / deviations**0.5 * (count - 1) / count


class Traces:
    """Gradients of the dense decoder's next-token loss by the weights of each of its blocks.

    Args:
        decoder: dense, where it shall run.
        windows: ids ``[windows, tokens]``.
        batch: windows per pass. It changes speed and memory only.
        rank: if given, gradients are those of newly drawn LoRA adapters of that rank. Such an adapter ``B A`` begins
            with ``B = 0``, so the gradient by ``B`` is that by the weight times ``A^T``, and that by ``A`` is zero.
        generator: of the adapters, on the CPU.

    Raises:
        RunFailed: a gradient is not finite.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: torch.Tensor,
        batch: int,
        rank: int | None,
        generator: torch.Generator,
    ) -> None:
        self.decoder, self.batch, self.rank = decoder, batch, rank
        self.windows = windows.to(decoder.embed.weight.device)
        self._weights = {block: _weights_of(decoder, block) for block in half_layers(decoder)}
        self._adapters: dict[int, torch.Tensor] = {}
        if rank is not None:
            for weight in (weight for weights in self._weights.values() for weight in weights):
                drawn = 2 * torch.rand(rank, weight.shape[1], generator=generator) - 1
                self._adapters[id(weight)] = drawn * weight.shape[1] ** -0.5
        # A copy of the model in size, so in its own type and off the accelerator.
        self.base = {
            block: [
                piece.to("cpu", weight.dtype)
                for piece, weight in zip(pieces, self._weights[block], strict=True)
            ]
            for block, pieces in self._trace(list(self._weights)).items()
        }
        if not all(bool(piece.isfinite().all()) for pieces in self.base.values() for piece in pieces):
            raise RunFailed("the gradient is NaN or infinite; load the model in float32 or bfloat16")

    def _trace(self, blocks: Sequence[Block]) -> dict[Block, list[torch.Tensor]]:
        weights = [weight for block in blocks for weight in self._weights[block]]
        pieces = iter(
            zip(weights, loss_gradient(self.decoder, weights, self.windows, self.batch), strict=True)
        )
        return {block: [self._seen(*next(pieces)) for _ in self._weights[block]] for block in blocks}

    def _seen(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """``[out, in]``, or ``[out, rank]`` through an adapter."""
        adapter = self._adapters.get(id(weight))
        return gradient if adapter is None else gradient @ adapter.T.to(gradient)

    def score(self, masks: Mapping[Block, torch.Tensor | None]) -> float:
        """Sum over the blocks that stay of the correlation between their gradients with ``masks`` and without.

        Args:
            masks: see ``narrowed``.
        """
        active = [block for block in self._weights if masks.get(block) is not None]
        with narrowed(self.decoder, masks):
            traces = self._trace(active)
        return sum(correlation(traces[block], self.base[block], self._zeros(block)) for block in active)

    def _zeros(self, block: Block) -> int:
        return sum(self._adapters[id(w)].numel() for w in self._weights[block]) if self._adapters else 0


def _weights_of(decoder: Decoder, block: Block) -> list[nn.Parameter]:
    """Weights of the linear layers of a block, those that are fused once."""
    layer = decoder.layers[block.index]
    names = ("attention", "output") if block.part == "attention" else ("mlp", "down")
    linears = {id(part.linear): part.linear for name in names for part in layer.by_input[name]}
    weights: list[Any] = [linear.weight for linear in linears.values()]
    return weights
