"""The local pruner of Týr-the-Pruner: groups of input columns of one matrix leave, heads or single channels."""

from __future__ import annotations

import torch

from zoo.engines.second_order import damped, inverse, refit_columns, removal_costs, remove_columns

DAMPING = 0.01
EMPTY = 1e-12
"""A group whose weights add up to no more than this counts as removed already."""


class GroupPruner:
    """Local pruning of ``weight [out, groups * size]``, given ``moment = sum x x^T [in, in]`` of its inputs.

    What several sparsities need alike is computed once.

    Raises:
        RunFailed: the damped Hessian cannot be inverted.
    """

    def __init__(self, weight: torch.Tensor, moment: torch.Tensor, size: int) -> None:
        self.size, self.groups = size, weight.shape[1] // size
        self.dense = weight.float().to(moment.device)
        self.weight = self.dense.masked_fill(moment.diagonal() == 0, 0)
        self.hessian = damped(moment, DAMPING)
        self.target = self.weight @ self.hessian
        self.inverse = inverse(self.hessian)

    def keep(self, count: int, updates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``count`` groups.

        A group is scored by what removing it adds to the error at best, plus ``sum(W_g * G_g)`` with ``G = W H``, as
        released; what scores least leaves.

        Args:
            count: how many stay.
            updates: passes in which the others leave, equally many in each; scores are taken anew before every pass.

        Returns:
            The mask of groups that stay ``[groups]``, and the weight ``[out, in]`` float32, zero in columns that leave.
        """
        everything = torch.ones(self.groups, dtype=torch.bool, device=self.weight.device)
        if count >= self.groups:
            return everything, self.dense
        if count <= 0:
            return ~everything, torch.zeros_like(self.weight)
        kept = self._by_group(self.weight.abs()) > EMPTY
        weight, rest = remove_columns(self.weight, self.inverse, self._columns((~kept).nonzero().flatten()))
        leaving = max(0, int(kept.sum()) - count)
        rounds = max(1, min(updates, leaving))
        for number in range(rounds):
            share = leaving // rounds + (number < leaving % rounds)
            scores = removal_costs(weight, rest, self.size) + self._by_group(weight * self.target)
            worst = scores.argsort(stable=True)[:share]
            weight, rest = remove_columns(weight, rest, self._columns(worst))
            kept[worst] = False
        return kept, refit_columns(self.hessian, self.target, kept.repeat_interleave(self.size))

    def _by_group(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of ``values [out, in]`` over each group, ``[groups]``."""
        return values.view(len(values), self.groups, self.size).sum((0, 2))

    def _columns(self, groups: torch.Tensor) -> torch.Tensor:
        """Indices of all columns of ``groups [n]``, ``[n * size]``."""
        return (groups[:, None] * self.size + torch.arange(self.size, device=groups.device)).flatten()
