"""What a token method decides: which tokens stay, and what becomes of the others.

All forms are special cases of one linear map ``y = W x`` with ``W [B, K, N]``; keeping them apart avoids the
dense matrix where an index is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


def _rows(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``x [B, N, ...]`` at ``index [B, K]``: ``[B, K, ...]``.

    Flat row indices: on a CPU several times faster than gathering with an index for every channel.
    """
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, *x.shape[2:])


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
        return _rows(self.index, x)


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
        """``x [B, N, D]`` -> ``[B, K, D]``, in the type of ``x``; half precision is summed in float32."""
        slot = torch.where(self.assignment < 0, self.length, self.assignment)
        kind = torch.promote_types(x.dtype, torch.float32)
        weighted = x * self.weight.to(kind).unsqueeze(-1)
        out = weighted.new_zeros(x.shape[0], self.length + 1, x.shape[2])
        out = out.scatter_add(1, slot.unsqueeze(-1).expand_as(x), weighted)[:, :-1]
        if self.normalise:
            out = out / self.sizes().to(kind).unsqueeze(-1)
        return out.to(x.dtype)


@dataclass(frozen=True)
class Join:
    """Some tokens stay, others join one of them: a :class:`Merge` whose index work is as small as the change.

    ``y_k = (w_k x_k + sum_{n joins k} w_n x_n)``, divided by the weights. A token that nobody joins stays bit-equal.

    Attributes:
        anchor: positions of the tokens that stay, in the order of the output, ``[B, K]``.
        moved: positions of the tokens that join one of them, ``[B, R]``.
        target: output token (an index into ``anchor``) that each of these joins, ``[B, R]``.
        tokens: length before, ``N``. A token that is neither in ``anchor`` nor in ``moved`` is dropped.
        weight: ``[B, N]``, e.g. token sizes; ``None`` = all ones.
        normalise: divide by the summed weight (mean) or not (sum).
    """

    anchor: torch.Tensor
    moved: torch.Tensor
    target: torch.Tensor
    tokens: int
    weight: torch.Tensor | None = None
    normalise: bool = True

    @property
    def length(self) -> int:
        """``K``."""
        return self.anchor.shape[1]

    @cached_property
    def assignment(self) -> torch.Tensor:
        """Output token that each token becomes or joins, ``[B, N]`` (int64); -1 = dropped."""
        place = self.anchor.new_full((self.anchor.shape[0], self.tokens), -1)
        order = torch.arange(self.length, device=place.device).expand_as(self.anchor)
        return place.scatter(1, self.anchor, order).scatter(1, self.moved, self.target)

    def sizes(self) -> torch.Tensor:
        """Summed weight of each output token, ``[B, K]``."""
        return self._total

    @cached_property
    def _total(self) -> torch.Tensor:
        staying, joining = self._weights()
        return staying.scatter_add(1, self.target, joining)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.weight is None:
            staying = torch.ones(self.anchor.shape, device=self.anchor.device)
            return staying, staying.new_ones(self.moved.shape)
        return self.weight.gather(1, self.anchor), self.weight.gather(1, self.moved)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, K, D]``, in the type of ``x``; half precision is summed in float32."""
        staying, joining = self._weights()
        if self.normalise:
            staying, joining = staying / self._total, joining / self._total.gather(1, self.target)
        kind = torch.promote_types(x.dtype, torch.float32)
        out = _rows(self.anchor, x) * staying.unsqueeze(-1).to(kind)
        moved = _rows(self.moved, x) * joining.unsqueeze(-1).to(kind)
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        out.flatten(0, 1).index_add_(0, (self.target + rows * self.length).flatten(), moved.flatten(0, 1))
        return out.to(x.dtype)


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


@dataclass(frozen=True)
class Blend(Transform):
    """Every token is shared out among the outputs, which are means: a :class:`Merge` of many to many.

    ``y_k = sum_n matrix_kn w_n x_n / sum_n matrix_kn w_n``: rows of non-negative shares never leave the convex hull of
    the tokens.

    Attributes:
        matrix: share of each token that goes to each output, ``[B, K, N]``; columns sum to at most 1.
        weight: ``[B, N]``, e.g. token sizes.
    """

    weight: torch.Tensor

    def sizes(self) -> torch.Tensor:
        """Summed weight of each output token, ``[B, K]``."""
        return (self.matrix @ self.weight.unsqueeze(-1)).squeeze(-1)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, K, D]``, in the type of ``x``."""
        total = self.sizes().clamp(min=torch.finfo(self.matrix.dtype).tiny)
        return (self.matrix * self.weight.unsqueeze(1) / total.unsqueeze(-1)).to(x.dtype) @ x


@dataclass(frozen=True)
class Absorb:
    """Some tokens stay and take in shares of those that leave: ``y_k = x_k + sum_r share_kr x_r``.

    A :class:`Transform` whose work grows with the number of tokens that leave, not with that of all.

    Attributes:
        anchor: positions of the tokens that stay, in the order of the output, ``[B, K]``.
        moved: positions of those that leave, ``[B, R]``.
        share: how much of each goes into each that stays, ``[B, K, R]``.
        tokens: length before, ``N = K + R``.
    """

    anchor: torch.Tensor
    moved: torch.Tensor
    share: torch.Tensor
    tokens: int

    @property
    def length(self) -> int:
        """``K``."""
        return self.anchor.shape[1]

    @cached_property
    def matrix(self) -> torch.Tensor:
        """The same as one linear map, ``[B, K, N]``."""
        empty = self.share.new_zeros(*self.anchor.shape, self.tokens)
        itself = empty.scatter(2, self.anchor.unsqueeze(-1), 1.0)
        return itself.scatter(2, self.moved.unsqueeze(1).expand_as(self.share), self.share)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, K, D]``, in the type of ``x``; half precision is summed in float32."""
        kind = torch.promote_types(x.dtype, torch.float32)
        staying, moved = _rows(self.anchor, x).to(kind), _rows(self.moved, x).to(kind)
        return torch.baddbmm(staying, self.share.to(kind), moved).to(x.dtype)


@dataclass(frozen=True)
class Replace(Transform):
    """Tokens that the method has made itself, where no linear map of the given ones is the same.

    A method that merges encoder features in front of a projector with a nonlinearity returns what the projector made
    of them.

    Attributes:
        values: the new tokens, ``[B, K, D]``.
        matrix: ``[B, K, N]``, which token went into which, for those who draw it; not used to compute anything.
    """

    values: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``values`` in the type of ``x``, whatever ``x`` is; not for models that add features layer by layer."""
        return self.values.to(x.dtype)


Reduction = Keep | Merge | Join | Transform | Absorb
