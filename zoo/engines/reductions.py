"""What a token method decides: which tokens stay, and what becomes of the others.

All three forms are special cases of one linear map ``y = W x`` with ``W [B, K, N]``; keeping them apart avoids the
dense matrix where an index is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


def _expand(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index.reshape(*index.shape, *([1] * (x.dim() - 2))).expand(-1, -1, *x.shape[2:])


@dataclass(frozen=True)
class Keep:
    """Some tokens stay as they are.

    Attributes:
        index: kept positions ``[B, K]`` (int64), in the order the tokens shall have.
        valid: ``[B, K]`` bool, for batches whose samples keep different numbers: ``False`` marks padding entries.
            ``None`` = all valid.
    """

    index: torch.Tensor
    valid: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """``K``."""
        return self.index.shape[1]

    @property
    def anchor(self) -> torch.Tensor:
        """The position whose place (position id, mask) each output token takes, ``[B, K]``."""
        return self.index

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, ...]`` -> ``[B, K, ...]``."""
        return x.gather(1, _expand(self.index, x))


@dataclass(frozen=True)
class Merge:
    """Every token goes into one output token (or nowhere): ``y_k = sum_{a_n = k} w_n x_n``, divided by the weights.

    Attributes:
        assignment: output index of each token ``[B, N]`` (int64); -1 drops it.
        weight: ``[B, N]``, e.g. token sizes.
        anchor: position whose place each output token takes, ``[B, K]``.
        normalise: divide by the summed weight (mean) or not (sum).
        moved: positions ``[B, R]`` of the tokens that join another one, when each anchor is assigned to its own
            output token and all other tokens are either in ``moved`` or dropped. Only these rows are then added up,
            which is much cheaper than going through all of them. ``None`` = not known.
    """

    assignment: torch.Tensor
    weight: torch.Tensor
    anchor: torch.Tensor
    normalise: bool = True
    moved: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """``K``."""
        return self.anchor.shape[1]

    def sizes(self) -> torch.Tensor:
        """Summed weight of each output token, ``[B, K]``."""
        return self._total

    @cached_property
    def _total(self) -> torch.Tensor:
        if self.moved is not None:
            joining = self.weight.gather(1, self.moved)
            slot = self.assignment.gather(1, self.moved)
            return self.weight.gather(1, self.anchor).scatter_add(1, slot, joining)
        total = self.weight.new_zeros(self.weight.shape[0], self.length + 1)
        slot = torch.where(self.assignment < 0, self.length, self.assignment)
        return total.scatter_add(1, slot, self.weight)[:, :-1]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, K, D]``, in the type of ``x``."""
        if self.moved is not None:
            return self._add_moved(x, self.moved)
        slot = torch.where(self.assignment < 0, self.length, self.assignment)
        weighted = x * self.weight.to(x.dtype).unsqueeze(-1)
        out = x.new_zeros(x.shape[0], self.length + 1, x.shape[2])
        out = out.scatter_add(1, _expand(slot, x), weighted)[:, :-1]
        return out / self._total.to(x.dtype).unsqueeze(-1) if self.normalise else out

    def _add_moved(self, x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """Anchors times their share, plus the tokens that join them; an anchor nobody joins stays bit-equal."""
        slot = self.assignment.gather(1, moved)
        anchored, joining = self.weight.gather(1, self.anchor), self.weight.gather(1, moved)
        if self.normalise:
            total = self._total
            anchored, joining = anchored / total, joining / total.gather(1, slot)
        out = x.gather(1, _expand(self.anchor, x)) * anchored.to(x.dtype).unsqueeze(-1)
        rows = x.gather(1, _expand(moved, x)) * joining.to(x.dtype).unsqueeze(-1)
        # One flat row index: on a CPU several times faster than a scatter with an index for every channel.
        start = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * self.length
        return out.flatten(0, 1).index_add(0, (slot + start).flatten(), rows.flatten(0, 1)).view_as(out)


@dataclass(frozen=True)
class Transform:
    """The general case: ``y = matrix @ x``.

    Attributes:
        matrix: ``[B, K, N]``.
        anchor: position whose place each output token takes, ``[B, K]``.
    """

    matrix: torch.Tensor
    anchor: torch.Tensor

    @property
    def length(self) -> int:
        """``K``."""
        return self.matrix.shape[1]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, K, D]``."""
        return self.matrix.to(x.dtype) @ x


Reduction = Keep | Merge | Transform
