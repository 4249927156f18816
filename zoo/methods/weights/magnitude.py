"""Magnitude pruning of single weights: the smallest of every matrix become zero.

The oldest criterion (Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, NIPS
2015, arXiv 1506.02626), in one shot and without the retraining of that paper: the baseline in the code of Wanda. One
threshold serves a matrix, or a group of an n:m pattern. It reads no text.
"""

from __future__ import annotations

from typing import Any

import torch

from zoo.engines.weight_masks import highest_in_groups, highest_in_matrix
from zoo.families.weight_sparsity import WeightSparsifier
from zoo.interface import register
from zoo.models.anatomy import LinearPart


@register("magnitude")
class Magnitude(WeightSparsifier):
    """Absolute values, compared within a matrix or within n:m groups."""

    def kept(self, weight: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Mask ``[out, in]`` of the weights that stay."""
        group = self.group_at(sparsity)
        if group is not None:
            return highest_in_groups(weight.abs(), group)
        return highest_in_matrix(weight.abs(), sparsity)

    def sparsify(self, part: LinearPart, seen: Any, sparsity: float) -> torch.Tensor:
        """The weights that stay, as they are."""
        return part.weight.where(self.kept(part.weight, sparsity), 0)
