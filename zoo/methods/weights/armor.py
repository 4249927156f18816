"""ARMOR: a sparse core between two block-diagonal matrices takes the place of every weight matrix.

Liu et al.: ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization, ICLR 2026 (arXiv
2510.05528). ``W ~ A S B`` with S in an n:m pattern: the dense wrappers A and B, a small part of the weights, correct
before and behind S what the rigid pattern breaks. Steps of Adam on all three alternate with choosing anew which
entries of S stay, so that ``sum_ij h_j (A S B - W)_ij^2`` falls, with ``h_j`` the mean square of input j. Matrices are
independent of each other: the statistics of all come from one pass through the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from zoo.engines.statistics import SquareSum
from zoo.errors import Refused
from zoo.families.weight_sparsity import WeightSparsifier, nonzero_weights
from zoo.interface import register
from zoo.methods.weights._armor_factors import Factors, greedy, in_proportion, normalised, optimise
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer, LinearPart
from zoo.models.modeling_pruned import BlockWrapped


def input_weights(square_sum: torch.Tensor) -> torch.Tensor:
    """``h [in]`` with a mean of one; inputs whose statistic is zero or not finite get the mean of the others."""
    valid = square_sum.isfinite() & (square_sum > 0)
    if not bool(valid.any()):
        return torch.ones_like(square_sum)
    mean = square_sum[valid].mean()
    return torch.where(valid, square_sum, mean) / mean


@register("armor")
class Armor(WeightSparsifier):
    """Factors ``A S B``, optimised one weight matrix at a time."""

    sequential: ClassVar[bool] = False

    pattern: str | None = Field(
        "2:4",
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description="n:m, of the core: of every m weights along the input, n stay.",
    )
    block: int = Field(32, ge=2, description="Width b of the blocks of A and B; divides all dimensions.")
    iterations: int = Field(
        3000,
        ge=0,
        description="Steps per matrix, as released: hours without a GPU, where 100 give a first idea.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Of Adam.")
    patience: int = Field(100, ge=1, description="Steps without progress after which a matrix is left.")
    selection: Literal["random", "greedy"] = Field(
        "random",
        description="Which group of each block is chosen anew: drawn in proportion to its gradient, or the largest.",
    )
    selection_seed: int = Field(0, ge=0, description="Of these draws.")
    fold: bool = Field(
        False,
        description="Store the products A S B as ordinary dense matrices, which plain transformers load; nothing is "
        "smaller then.",
    )

    @model_validator(mode="after")
    def _groups_fill_blocks(self) -> Armor:
        if self.group is None:
            raise ValueError("the core needs a pattern, such as 2:4")
        if self.block % self.group[1]:
            raise ValueError(
                f"block must be a multiple of the pattern's {self.group[1]} (given: {self.block})"
            )
        return self

    def check(self, loaded: LoadedModel) -> None:
        """Blocks fill all dimensions."""
        super().check(loaded)
        assert loaded.anatomy.decoder is not None
        sizes = {
            size for x in loaded.anatomy.decoder.layers for part in x.linears for size in part.weight.shape
        }
        uneven = sorted(size for size in sizes if size % self.block)
        if uneven:
            raise Refused(
                f"{self.slug} needs widths that are multiples of its block ({self.block}); this model has {uneven[0]}: "
                "set another block"
            )

    def observer(self, inputs: int) -> SquareSum:
        """The squares of the inputs."""
        return SquareSum()

    def factorise(self, weight: torch.Tensor, square_sum: torch.Tensor, sparsity: float) -> Factors:
        """Factors of ``weight [out, in]``, float32, with the lengths that normalisation took out put into A and B."""
        group = self.group_at(sparsity)
        assert group is not None
        unit, columns, rows = normalised(weight.float())
        moment = input_weights(square_sum.to(weight.device))
        generator = torch.Generator().manual_seed(self.selection_seed)
        select = greedy if self.selection == "greedy" else in_proportion(generator)
        factors = Factors.start(unit, moment, group, self.block)
        optimise(
            factors,
            unit,
            moment,
            group,
            select,
            iterations=self.iterations,
            rate=self.learning_rate,
            patience=self.patience,
        )
        factors.left = factors.left * rows.view(-1, self.block, 1)
        factors.right = factors.right * columns.view(-1, 1, self.block)
        return factors

    def sparsify(self, part: LinearPart, seen: SquareSum, sparsity: float) -> torch.Tensor:
        """The product ``A S B``."""
        return self.factorise(part.weight, seen.mean, sparsity).product()

    def sparsify_layer(self, layer: DecoderLayer, seen: Mapping[str, Any], sparsity: float) -> None:
        """Put wrapped linear layers in place; what is fused of several is one matrix."""
        if self.fold:
            super().sparsify_layer(layer, seen, sparsity)
            return
        for name, parts in layer.by_input.items():
            for part in {(id(part.owner), part.name): part for part in parts}.values():
                factors = self.factorise(part.linear.weight, seen[name].mean, sparsity)
                setattr(part.owner, part.name, wrapped(part.linear, factors))

    def remaining(self, decoder: Decoder) -> int:
        """Weights of cores that are not zero, and those of the wrappers."""
        return sum(stored_weights(layer) for layer in decoder.layers)

    def widths(self, layer: DecoderLayer) -> dict[str, int]:
        """One bar per layer."""
        return {"non-zero weights": stored_weights(layer)}


@torch.no_grad()
def wrapped(old: nn.Linear, factors: Factors) -> BlockWrapped:
    """A layer with the bias, type and device of ``old`` that multiplies by the three factors."""
    new = BlockWrapped(
        old.in_features, old.out_features, factors.block, bias=False, device="meta", dtype=old.weight.dtype
    )
    values = {"left": factors.left, "weight": factors.core * factors.mask, "right": factors.right}
    for name, value in values.items():
        setattr(new, name, nn.Parameter(value.to(old.weight), requires_grad=old.weight.requires_grad))
    new.bias = old.bias
    return new.train(old.training)


def stored_weights(layer: DecoderLayer) -> int:
    """How many weights of the layer's linears are not zero, wrappers included."""
    linears = {id(part.linear): part.linear for part in layer.linears}.values()
    return nonzero_weights(layer) + sum(
        linear.left.numel() + linear.right.numel() for linear in linears if isinstance(linear, BlockWrapped)
    )
