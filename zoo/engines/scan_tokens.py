"""Shortening the sequence of a state-space encoder while it runs.

After a block, a method looks at what the block's scans gave for each token and says which tokens stay. This engine cuts
hidden states and residual stream alike, and tells every later block where its tokens stood in the full sequence, so
that its scans can keep their distances (*hidden-state alignment*, arXiv 2409.18962).

Everything is done with hooks, which ``close`` removes. All state of an input lives in a pass that begins with the first
block and ends with the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.engines.latest_input import RecordsLatest
from zoo.errors import BadInput
from zoo.models.anatomy import StateSpaceBlock, StateSpaceEncoder


@dataclass
class ScanView:
    """What a method may look at behind a block, for the whole batch.

    Attributes:
        cls: place of [CLS] among the tokens; ``None`` without one.
        output: what both scans gave together, gate included: ``[B, N, C]``.
        backward: what the backward scan gave, in *its* order (last token first): ``[B, N, C]``.
    """

    cls: int | None = None
    output: torch.Tensor | None = None
    backward: torch.Tensor | None = None


Select = Callable[[ScanView], torch.Tensor]
"""The tokens that stay, ``[B, K]``, as places in the present sequence: patches in order, [CLS] in their middle."""


@dataclass
class _Pass:
    """One input on its way through the blocks."""

    origin: torch.Tensor
    """Place that each token had when it came in, ``[B, N]``."""
    positions: torch.Tensor
    """Place that each token has in the scans, ascending, ``[B, N]``: ``origin``, unless [CLS] had to move."""
    entered: int
    tokens: list[int] = field(default_factory=list)


class ScanReducer(RecordsLatest[_Pass]):
    """Installs ``stages`` on the blocks of a state-space encoder; ``close`` removes them.

    Args:
        encoder: where the blocks are.
        stages: for each block (from 0) behind which tokens leave, who chooses.
        name: who reduces, for messages.
        aligned: later blocks are told the positions of their tokens; else they see them as neighbours.
        decay_gaps: what the blocks do with positions, see :class:`zoo.models.vim.VimScan`.
    """

    def __init__(
        self,
        encoder: StateSpaceEncoder,
        stages: Mapping[int, Select],
        name: str,
        *,
        aligned: bool = True,
        decay_gaps: bool = False,
    ) -> None:
        self.encoder = encoder
        self.name = name
        self._stages = stages
        self._aligned = aligned
        self._decay_gaps = decay_gaps
        self._current: _Pass | None = None
        self._hooks: list[Any] = []
        for index, block in enumerate(encoder.blocks):
            self._install(index, block)

    def close(self) -> None:
        """Undo everything; what was recorded stays readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # --- what the latest input became ------------------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """Tokens that entered each block, and those that left the last one.

        Raises:
            BadInput: no input has run yet.
        """
        return self._finished.tokens

    @property
    def entered(self) -> int:
        """Tokens of the sequence before any reduction."""
        return self._finished.entered

    @property
    def left(self) -> int:
        """Tokens after the last reduction."""
        return self._finished.tokens[-1]

    @property
    def kept(self) -> torch.Tensor:
        """Original places of the tokens that are left, in the order of the sequence, ``[B, K]``."""
        return self._finished.origin

    @property
    def sources(self) -> torch.Tensor:
        """1 where an output token is that input token, else 0: ``[B, K, N]`` float32."""
        return nn.functional.one_hot(self.kept, self.entered).float()

    @property
    def patch_sources(self) -> torch.Tensor:
        """``sources`` without [CLS] on either side, ``[B, k, n]``."""
        _, rows = self.encoder.split(self.sources)
        return self.encoder.split(rows.transpose(1, 2))[1].transpose(1, 2)

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """Bring output tokens back to their places: ``y [B, K, D]`` -> ``[B, N, D]``, zeros where one has left.

        Raises:
            BadInput: ``y`` does not have the length of the reduced sequence.
        """
        kept = self.kept
        if y.dim() != 3 or y.shape[:2] != kept.shape:
            raise BadInput(
                f"unmerge takes [{len(kept)}, {kept.shape[1]}, dim] (one row for each token that {self.name} left), "
                f"not {list(y.shape)}"
            )
        full = y.new_zeros(len(y), self.entered, y.shape[2])
        return full.scatter(1, kept.to(y.device).unsqueeze(-1).expand_as(y), y)

    # --- on the way ------------------------------------------------------------------------------------------------

    def _install(self, index: int, block: StateSpaceBlock) -> None:
        self._hooks.append(
            block.module.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)
        )
        view = ScanView()
        if index in self._stages:

            def see_backward(module: nn.Module, args: Any, output: torch.Tensor) -> None:
                view.backward = output

            def see_output(module: nn.Module, args: tuple[torch.Tensor]) -> None:
                view.output = args[0]

            self._hooks.append(block.backward_scan.register_forward_hook(see_backward))
            self._hooks.append(block.output.register_forward_pre_hook(see_output))
        self._hooks.append(block.module.register_forward_hook(partial(self._after, index, view)))

    def _before(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden = args[0]
        batch, tokens = hidden.shape[:2]
        if index == 0:
            places = torch.arange(tokens, device=hidden.device).expand(batch, -1)
            self._current = _Pass(places, places, tokens)
        current = self._current
        assert current is not None
        current.tokens.append(tokens)
        if not self._aligned or tokens == current.entered:
            return None
        return args, {**kwargs, "positions": current.positions, "decay_gaps": self._decay_gaps}

    def _after(
        self,
        index: int,
        view: ScanView,
        module: nn.Module,
        args: Any,
        output: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        current = self._current
        assert current is not None
        shorter = None
        if index in self._stages:
            before = output[0].shape[1]
            view.cls = self.encoder.cls_place(before)
            kept = self._stages[index](view)
            view.output = view.backward = None
            if kept.shape[1] < before:
                after = self.encoder.cls_place(kept.shape[1])
                current.positions = positions_of(kept, current.positions, view.cls, after)
                current.origin = current.origin.gather(1, kept)
                shorter = (_gathered(output[0], kept), _gathered(output[1], kept))
        if index == len(self.encoder.blocks) - 1:
            current.tokens.append(current.origin.shape[1])
            self._latest, self._current = current, None
        return shorter


def positions_of(
    kept: torch.Tensor, positions: torch.Tensor, cls_before: int | None, cls_after: int | None
) -> torch.Tensor:
    """Positions of the tokens that stay, ascending.

    [CLS] is put into the middle of the patches that stay. Where that is not between the patches it stood between, it
    moves to the nearest position that is, and the patches on the way close up by one.

    Args:
        kept: columns of ``positions``, ``[B, K]``.
        positions: ascending, ``[B, N]``.
        cls_before, cls_after: column of [CLS] before and among ``kept``; ``None`` without [CLS].

    Returns:
        ``[B, K]``.
    """
    if cls_before is None or cls_after is None:
        return positions.gather(1, kept)
    cls = positions[:, cls_before : cls_before + 1]
    # Patches counted without [CLS]; a position is then the number of patches in front.
    patches = torch.cat((kept[:, :cls_after], kept[:, cls_after + 1 :]), dim=1)
    number = positions.gather(1, patches)
    number = number - (number > cls).long()
    if cls_after > 0:
        cls = torch.maximum(cls, number[:, cls_after - 1 : cls_after] + 1)
    if cls_after < number.shape[1]:
        cls = torch.minimum(cls, number[:, cls_after : cls_after + 1])
    place = number + (number >= cls).long()
    return torch.cat((place[:, :cls_after], cls, place[:, cls_after:]), dim=1)


def _gathered(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
