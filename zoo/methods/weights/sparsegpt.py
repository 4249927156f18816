"""SparseGPT: zero weights column by column, and let the columns still to come make up for the error.

Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023 (arXiv
2301.00774). Each linear layer is a least-squares problem with one Hessian ``H = X X^T`` for all rows. Removing weight
``w_j`` costs ``w_j^2 / [H^-1]_jj``, with the inverse of what is still free to change; a Cholesky factor of ``H^-1``
holds all of these inverses at once (section 3.3), so one sweep over the columns prunes and repairs the whole matrix.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field, model_validator

from zoo.engines.second_order import SecondMoment, damped, inverse_factor, sweep_columns
from zoo.engines.weight_masks import highest_in_groups, highest_in_matrix
from zoo.families.weight_sparsity import WeightSparsifier
from zoo.interface import register
from zoo.models.anatomy import LinearPart


@register("sparsegpt")
class SparseGPT(WeightSparsifier):
    """Optimal brain surgery by columns, within blocks of columns or within n:m groups."""

    block: int = Field(128, ge=1, description="Columns that are pruned together, with one threshold.")
    damping: float = Field(
        0.01, gt=0, description="Added to the diagonal of the Hessian, relative to its mean."
    )

    @model_validator(mode="after")
    def _groups_fill_blocks(self) -> SparseGPT:
        if self.group is not None and self.block % self.group[1]:
            raise ValueError(
                f"block must be a multiple of the pattern's {self.group[1]} (given: {self.block})"
            )
        return self

    def observer(self, inputs: int) -> SecondMoment:
        """The Hessian."""
        return SecondMoment()

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor, sparsity: float) -> torch.Tensor:
        """The sparse weight ``[out, in]`` float32, given the Hessian ``[in, in]`` of its inputs.

        Raises:
            RunFailed: the damped Hessian cannot be inverted.
        """
        dead = hessian.diagonal() == 0
        hessian = hessian + torch.diag(dead.to(hessian.dtype))
        factor = inverse_factor(damped(hessian, self.damping))
        # An input that was always zero has weights that nothing speaks for.
        weight = weight.float().masked_fill(dead, 0)
        group = self.group_at(sparsity)
        if group is not None:
            choose = partial(highest_in_groups, group=group)
            return sweep_columns(weight, factor, choose, chosen=group[1], block=self.block)
        choose = partial(highest_in_matrix, sparsity=sparsity)
        return sweep_columns(weight, factor, choose, chosen=self.block, block=self.block)

    def sparsify(self, part: LinearPart, seen: SecondMoment, sparsity: float) -> torch.Tensor:
        """Prune and repair."""
        return self.solve(part.weight, seen.hessian, sparsity)
