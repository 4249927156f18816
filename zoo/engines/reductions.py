"""What a token method decides: which tokens stay, and what becomes of the others.

All three forms are special cases of one linear map ``y = W x`` with ``W [B, K, N]``; keeping them apart avoids the
dense matrix where an index is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    assignment: torch.Tensor
    weight: torch.Tensor
    anchor: torch.Tensor
    normalise: bool = True

    @property
    def length(self) -> int:
        """``K``."""
        return self.anchor.shape[1]

    def sizes(self) -> torch.Tensor:
        """Summed weight of each output token, ``[B, K]``."""
        total = self.weight.new_zeros(self.weight.shape[0], self.length + 1)
        slot = torch.where(self.assignment < 0, self.length, self.assignment)
        return total.scatter_add(1, slot, self.weight)[:, :-1]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, K, D]``, in the type of ``x``."""
        slot = torch.where(self.assignment < 0, self.length, self.assignment)
        weighted = x * self.weight.to(x.dtype).unsqueeze(-1)
        out = x.new_zeros(x.shape[0], self.length + 1, x.shape[2])
        out = out.scatter_add(1, _expand(slot, x), weighted)[:, :-1]
        return out / self.sizes().to(x.dtype).unsqueeze(-1) if self.normalise else out


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
