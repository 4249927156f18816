"""ARMOR's factors of one weight matrix: ``W ~ A S B`` with a sparse core between block-diagonal wrappers.

``A`` is ``[out/b, b, b]`` (diagonal blocks of an ``[out, out]`` matrix), ``B`` is ``[in/b, b, b]``, the core ``S`` is
``[out, in]`` with N of every M consecutive entries of a row. The matrix falls into blocks ``[b, b]``, one for each pair
of a block of ``A`` and one of ``B``, and the blocks of the product do not depend on each other's core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch

from zoo.engines.weight_masks import highest_in_groups


def normalised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``W [out, in]`` with columns, then rows, of length one, and both lengths: ``[in]`` and ``[out]``."""
    columns = weight.norm(dim=0) + 1e-5
    weight = weight / columns
    rows = weight.norm(dim=1) + 1e-5
    return weight / rows.unsqueeze(1), columns, rows


@dataclass
class Factors:
    """``left`` is A, ``core`` and its ``mask`` are S, ``right`` is B; see the module."""

    left: torch.Tensor
    core: torch.Tensor
    mask: torch.Tensor
    right: torch.Tensor

    @classmethod
    def start(
        cls, weight: torch.Tensor, moment: torch.Tensor, pattern: tuple[int, int], block: int
    ) -> Factors:
        """The core holds the weights of largest ``W^2 h``, between identities.

        Args:
            weight: ``[out, in]``, normalised.
            moment: ``h [in]``, mean square of each input.
            pattern: ``(N, M)`` of the core.
            block: width ``b``; divides both dimensions.
        """
        mask = highest_in_groups(weight.square() * moment, pattern)
        identity = torch.eye(block, device=weight.device)
        left, right = (identity.repeat(size // block, 1, 1) for size in weight.shape)
        return cls(left, weight * mask, mask, right)

    @property
    def block(self) -> int:
        """Width ``b`` of the blocks."""
        return self.left.shape[-1]

    def product(self) -> torch.Tensor:
        """``A S B [out, in]``."""
        rows, columns = self.core.shape
        block = self.block
        half = self.left @ (self.core * self.mask).view(-1, block, columns)
        halves = half.view(rows, -1, block).transpose(0, 1)
        return (halves @ self.right).transpose(0, 1).reshape(rows, columns)

    def loss(self, weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """``sum h (A S B - W)^2 / sum h W^2``, a scalar."""
        error = (self.product() - weight).square() * moment
        return error.sum() / (weight.square() * moment).sum()

    def blocks(self, matrix: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` as ``[out/b, in/b, b, b]`` (a view)."""
        rows, columns = (size // self.block for size in matrix.shape)
        return matrix.view(rows, self.block, columns, self.block).transpose(1, 2)


Selection = Callable[[torch.Tensor], torch.Tensor]
"""From the gradient norms of a block's groups, ``[pairs, groups]``, to the one that is chosen again, ``[pairs]``."""


def greedy(norms: torch.Tensor) -> torch.Tensor:
    """The group of largest gradient."""
    return norms.argmax(1)


def in_proportion(generator: torch.Generator) -> Selection:
    """A group drawn with a chance in proportion to its gradient."""

    def draw(norms: torch.Tensor) -> torch.Tensor:
        # A block that fits exactly has no gradient at all; then any group will do.
        chances = norms + torch.finfo(norms.dtype).tiny
        return torch.multinomial(chances.cpu(), 1, generator=generator).squeeze(1).to(norms.device)

    return draw


@torch.no_grad()
def reselect(
    factors: Factors,
    weight: torch.Tensor,
    moment: torch.Tensor,
    pattern: tuple[int, int],
    select: Selection,
) -> None:
    """Choose one group of every block again: of all N-subsets of its M entries, the one that fits best.

    With ``a [b]`` the group's column of A and ``b [M, b]`` its rows of B, both fixed, the best values of a subset solve
    a least-squares problem of size N. Groups of different blocks act on different entries of the product, so doing all
    of them at once is exact. Changes ``core`` and ``mask`` in place.

    Args:
        factors: of ``weight``.
        weight: ``[out, in]``, normalised.
        moment: ``h [in]``.
        pattern: ``(N, M)`` of the core.
        select: which group of each block.
    """
    left, right, block, (kept, length) = factors.left, factors.right, factors.block, pattern
    residual = factors.blocks(factors.product() - weight)
    scale = moment.sqrt().view(-1, 1, block)  # [in/b, 1, b], for the columns of residual and B

    # The loss by the dense core, up to a factor that all blocks share.
    gradient = left.mT.unsqueeze(1) @ (residual * scale.square()) @ right.mT
    groups = gradient.abs().unflatten(-1, (-1, length)).sum(-1).flatten(2)
    chosen = select(groups.flatten(0, 1))
    pairs = torch.arange(len(chosen), device=chosen.device)
    p, q, row = pairs // groups.shape[1], pairs % groups.shape[1], chosen // (block // length)
    columns = (chosen % (block // length) * length).unsqueeze(1) + torch.arange(length, device=chosen.device)
    place = (p.unsqueeze(1), q.unsqueeze(1), row.unsqueeze(1), columns)
    core, mask = factors.blocks(factors.core), factors.blocks(factors.mask)

    a = left[p, :, row]  # [pairs, b]
    b = right[q.unsqueeze(1), columns] * scale[q]  # [pairs, M, b]
    before = (core[place] * mask[place]).unsqueeze(1) @ b
    without = (residual * scale)[p, q] - a.unsqueeze(2) * before  # the residual when the group is empty
    target = (b @ (without.mT @ a.unsqueeze(2))).squeeze(2)
    gram = b @ b.mT

    subsets = torch.tensor(list(combinations(range(length), kept)), device=chosen.device)
    grams = gram[:, subsets.unsqueeze(2), subsets.unsqueeze(1)]
    grams = grams + 1e-9 * torch.eye(kept, device=chosen.device)
    targets = target[:, subsets]
    solved = torch.linalg.solve_ex(grams, targets.unsqueeze(3)).result.squeeze(3)
    gains = (targets * solved).sum(2)  # NaN where a subset's rows of B depend on each other
    best = gains.nan_to_num(nan=-torch.inf).argmax(1)
    values = -solved[pairs, best] / (a.square().sum(1, keepdim=True) + 1e-8)

    core[place] = torch.zeros_like(target).scatter(1, subsets[best], values)
    mask[place] = torch.zeros_like(target, dtype=torch.bool).scatter(1, subsets[best], True)


def adam(factors: Factors, rate: float) -> torch.optim.Adam:
    """The optimiser of all three factors, which it makes trainable."""
    trained = [factors.left, factors.core, factors.right]
    return torch.optim.Adam([tensor.requires_grad_() for tensor in trained], lr=rate)


def descend(
    factors: Factors, optimiser: torch.optim.Adam, weight: torch.Tensor, moment: torch.Tensor
) -> float:
    """One step of gradient descent on the factors, in place; returns the loss before it."""
    with torch.enable_grad():
        loss = factors.loss(weight, moment)
        optimiser.zero_grad()
        loss.backward()
    optimiser.step()
    return float(loss.detach())


def optimise(
    factors: Factors,
    weight: torch.Tensor,
    moment: torch.Tensor,
    pattern: tuple[int, int],
    select: Selection,
    *,
    iterations: int,
    rate: float,
    patience: int,
) -> None:
    """Alternate one ``descend`` with one ``reselect``, in place.

    Ends early when the loss failed ``patience`` times in a row to fall by a millionth of itself and by 1e-8.
    """
    optimiser = adam(factors, rate)
    previous, stalled = torch.inf, 0
    for _ in range(iterations):
        loss = descend(factors, optimiser, weight, moment)
        reselect(factors, weight, moment, pattern, select)
        stuck = loss > previous * (1 - 1e-6) or loss > previous - 1e-8
        previous, stalled = loss, stalled + 1 if stuck else 0
        if stalled == patience:
            break
    for tensor in (factors.left, factors.core, factors.right):
        tensor.requires_grad_(False)
