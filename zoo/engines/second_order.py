"""Removing weights of a linear layer and letting the others make up for it (optimal brain surgeon).

A layer ``W [out, in]`` with calibration inputs ``x`` has the reconstruction error ``|(W' - W) X|^2``, whose Hessian is
the same for every row: ``H = X X^T [in, in]``. With its inverse, one knows what a weight or a group of input columns
costs and how the others change best when it goes (Hassibi & Stork 1992, Optimal Brain Surgeon).

``sweep_columns`` removes single weights, all rows at once, going through the columns from left to right (SparseGPT,
arXiv 2301.00774). ``removal_costs``, ``remove_columns`` and ``refit_columns`` remove whole groups of input columns, as
structured pruning does. Weights and Hessians are float32; TF32 products are not accurate enough for the inverses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.errors import RunFailed


class SecondMoment:
    """Sum of ``x x^T`` over all tokens, ``total [in, in]`` float32, and the number of ``sequences`` it was taken over.

    An observer for ``zoo.engines.statistics``.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.total = torch.zeros(())

    def update(self, *activations: torch.Tensor) -> None:
        """Add one sequence ``[tokens, in]``."""
        (x,) = activations
        self.total = self.total.to(x.device) + x.T @ x
        self.sequences += 1

    @property
    def hessian(self) -> torch.Tensor:
        """Hessian of the squared error per sequence: ``2/n sum x x^T``."""
        return self.total * (2 / self.sequences)


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """``H`` with ``damping`` times its mean diagonal added to the diagonal, so that it can be inverted."""
    amount = damping * hessian.diagonal().mean()
    return hessian + amount * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def inverse(hessian: torch.Tensor) -> torch.Tensor:
    """``H^-1`` of a positive definite ``H``, through its Cholesky factor.

    Raises:
        RunFailed: it is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed):
        raise RunFailed(
            "the Hessian of a layer's inputs is not positive definite; raise the damping or use more text"
        )
    return torch.cholesky_inverse(factor)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor ``U [in, in]`` of ``H^-1 = U^T U``.

    Row ``j`` of ``U`` holds what removing input ``j`` does when all inputs before it are settled, so one factor serves
    a sweep over all columns.

    Raises:
        RunFailed: ``H`` is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(inverse(hessian), upper=True)
    if bool(failed):
        raise RunFailed(
            "the inverse Hessian of a layer's inputs is not positive definite; raise the damping or use more text"
        )
    return factor


Choice = Callable[[torch.Tensor], torch.Tensor]
"""From the saliency of some columns, ``[out, columns]``, to the mask of weights that stay."""


def sweep_columns(
    weight: torch.Tensor, factor: torch.Tensor, choose: Choice, *, chosen: int, block: int
) -> torch.Tensor:
    """Remove weights column by column; what a column loses, the columns still to come make up for.

    Weights are chosen ``chosen`` columns at a time, by their saliency ``w^2 / U_jj^2`` when the sweep arrives there
    (arXiv 2301.00774, section 3.3).

    Args:
        weight: ``[out, in]``.
        factor: ``inverse_factor`` of the damped Hessian.
        choose: which weights stay.
        chosen: columns that one choice is about.
        block: columns whose effect on all later blocks is computed in one product, for speed. A multiple of
            ``chosen``.

    Returns:
        The new weight ``[out, in]``; exactly zero where removed.
    """
    weight = weight.clone()
    for start in range(0, weight.shape[1], block):
        columns = slice(start, start + block)
        part, rows = weight[:, columns], factor[columns, columns]
        errors = torch.zeros_like(part)
        for index in range(part.shape[1]):
            if index % chosen == 0:
                group = slice(index, index + chosen)
                kept = choose((part[:, group] / rows.diagonal()[group]).square())
            removed = ~kept[:, index % chosen]
            errors[:, index] = part[:, index] * removed / rows[index, index]
            part[:, index:] -= errors[:, index : index + 1] * rows[index, index:]
            part[removed, index] = 0
        weight[:, start + block :] -= errors @ factor[columns, start + block :]
    return weight


def removal_costs(weight: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """What removing each group of ``size`` consecutive input columns adds to the error at best.

    ``tr(W_g (H^-1_gg)^-1 W_g^T) / 2``, the others being free to make up for it.

    Args:
        weight: ``[out, groups * size]``.
        inverse: ``H^-1 [in, in]``, zero in rows and columns of inputs that are gone (see ``remove_columns``).
        size: columns per group.

    Returns:
        ``[groups]``, infinite for groups that are gone.
    """
    out, inputs = weight.shape
    if size == 1:  # nothing to solve; there may be many thousands of them
        left = inverse.diagonal()
        return torch.where(left == 0, torch.inf, weight.square().sum(0) / left / 2)
    groups = torch.arange(inputs // size, device=weight.device)
    blocks = inverse.view(len(groups), size, len(groups), size)[groups, :, groups]
    gone = blocks.diagonal(dim1=1, dim2=2).sum(1) == 0
    blocks = torch.where(gone[:, None, None], torch.eye(size, device=weight.device), blocks)
    columns = weight.view(out, len(groups), size).permute(1, 2, 0)
    costs = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2)) / 2
    return torch.where(gone, torch.inf, costs)


def remove_columns(
    weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Set input columns to zero and adjust the others.

    Args:
        weight: ``[out, in]``.
        inverse: ``H^-1 [in, in]`` of the inputs that are left.
        gone: indices of columns, ``[k]``.

    Returns:
        The new weight, and the inverse Hessian of what is left, zero in rows and columns of what is gone.
    """
    update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    weight = torch.addmm(weight, weight[:, gone], update, alpha=-1)
    inverse = torch.addmm(inverse, inverse[:, gone], update, alpha=-1)
    weight[:, gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0
    return weight, inverse


def refit_columns(hessian: torch.Tensor, target: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The least-squares weight on the inputs that are left: ``target_K H_KK^-1``, zero elsewhere.

    Args:
        hessian: ``[in, in]``, damped.
        target: correlation of the dense outputs with the inputs, ``W H [out, in]``.
        kept: mask ``[in]``.

    Returns:
        ``[out, in]``.
    """
    weight = torch.zeros_like(target)
    weight[:, kept] = torch.linalg.solve(hessian[kept][:, kept], target[:, kept], left=False)
    return weight
