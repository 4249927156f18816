"""Inside a denoising U-Net: self-attention on some of the tokens, and a look at its attention maps.

A block's tokens are the cells of an image grid. Its self-attention may run on part of them: the others get the output
of a token that ran, so behind it the grid is complete again, and convolutions, cross-attention and MLP see no
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import nn

from zoo.errors import BadInput
from zoo.models.anatomy import Attention, Denoiser

Grid = tuple[int, int]
"""Rows and columns of the tokens of a block."""


@dataclass(frozen=True)
class Reuse:
    """Which tokens run, and whose output each position gets.

    Attributes:
        kept: tokens that run, ``[B, K]``.
        source: for each position, a place in ``kept``: ``[B, N]``.
    """

    kept: torch.Tensor
    source: torch.Tensor

    def shorten(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the tokens that run: ``[B, N, C]`` -> ``[B, K, C]``."""
        return x.gather(1, self.kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Every position gets the row of its source: ``[B, K, C]`` -> ``[B, N, C]``."""
        return x.gather(1, self.source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


Choose = Callable[[torch.Tensor, Grid], Reuse | None]
"""From a block's input ``[B, N, C]`` and its grid to what runs; ``None`` = everything."""


def grid_of(tokens: int, latent: Grid) -> tuple[int, Grid]:
    """How many times smaller than the latents a block's grid is, and the grid.

    Args:
        tokens: of the block.
        latent: rows and columns of the latents.

    Raises:
        ValueError: no halving of the latents has so many cells.
    """
    factor = 1
    while factor <= max(latent):
        grid = ceil(latent[0] / factor), ceil(latent[1] / factor)
        if grid[0] * grid[1] == tokens:
            return factor, grid
        factor *= 2
    raise ValueError(f"{tokens} tokens are no halving of latents of {latent[0]} x {latent[1]}")


class SelfAttentionReuse:
    """Hooks that let the self-attention of the fine blocks of a U-Net run on part of the tokens, until ``close``.

    Args:
        denoiser: the U-Net.
        choose: called with the input of each block that is not coarser than ``max_downsample``, before its norm.
        max_downsample: how many times coarser than the latents a block may be; 1 = only the finest.
    """

    def __init__(self, denoiser: Denoiser, choose: Choose, max_downsample: int) -> None:
        self.lengths: list[tuple[int, int]] = []
        """Of the latest pass, per block: tokens in its self-attention, tokens of its grid."""
        self._choose = choose
        self._max_downsample = max_downsample
        self._latent: Grid = (0, 0)
        self._reuse: Reuse | None = None
        self._hooks = [denoiser.module.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for block in denoiser.blocks:
            attention = block.self_attention.module
            self._hooks += [
                block.module.register_forward_pre_hook(self._enter),
                attention.register_forward_pre_hook(self._shorten),
                attention.register_forward_hook(self._restore),
            ]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._reuse = None

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self._latent = sample.shape[-2:]
        self.lengths = []

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0].shape[1]
        factor, grid = grid_of(tokens, self._latent)
        self._reuse = None
        if factor <= self._max_downsample:
            with torch.no_grad():  # the choice has no gradient, what runs does
                self._reuse = self._choose(args[0].detach(), grid)
        self.lengths.append((tokens if self._reuse is None else self._reuse.kept.shape[1], tokens))

    def _shorten(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self._reuse is None else (self._reuse.shorten(args[0]), *args[1:])

    def _restore(self, _: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return None if self._reuse is None else self._reuse.restore(output)


class AttentionMaps:
    """Attention maps of one pass, averaged over heads and over the blocks of one grid, gradients included.

    Attributes:
        grid: of the blocks that are looked at.

    Reading a map raises ``BadInput`` when no block has that grid.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._seen: dict[str, list[torch.Tensor]] = {"text": [], "image": []}

    @property
    def over_text(self) -> torch.Tensor:
        """Cross-attention: how much each image token reads of each text token, ``[B, N, T]``."""
        return self._mean("text")

    @property
    def over_image(self) -> torch.Tensor:
        """Self-attention: how much each image token reads of each other, ``[B, N, N]``."""
        return self._mean("image")

    def _mean(self, kind: str) -> torch.Tensor:
        if not self._seen[kind]:
            rows, columns = self.grid
            raise BadInput(
                f"this U-Net has no attention on a grid of {rows} x {columns} tokens; choose another size"
            )
        return torch.stack(self._seen[kind]).mean(0)

    def add(self, kind: str, attention: Attention, tokens: torch.Tensor, context: torch.Tensor) -> None:
        """Compute the map of one attention from its inputs ``[B, N, C]`` and ``[B, M, D]``."""
        if tokens.shape[1] != self.grid[0] * self.grid[1]:
            return
        query, key = (
            part(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).float()
            for part, x in ((attention.query, tokens), (attention.key, context))
        )
        self._seen[kind].append((query @ key.mT * attention.scaling).softmax(-1).mean(1))


@contextmanager
def watch_attention(denoiser: Denoiser, grid: Grid) -> Iterator[AttentionMaps]:
    """Compute maps beside the fused attention, which runs as before; one pass per ``with`` block."""
    maps = AttentionMaps(grid)

    def see(
        kind: str, attention: Attention, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        context = kwargs.get("encoder_hidden_states")
        maps.add(kind, attention, args[0], args[0] if context is None else context)

    hooks = []
    try:
        for block in denoiser.blocks:
            for kind, attention in (("image", block.self_attention), ("text", block.cross_attention)):
                if attention is not None:
                    # In front of other hooks: a map is of all tokens, also where some do not run.
                    hooks.append(
                        attention.module.register_forward_pre_hook(
                            partial(see, kind, attention), with_kwargs=True, prepend=True
                        )
                    )
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
