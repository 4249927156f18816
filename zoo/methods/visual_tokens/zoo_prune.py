"""ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models
(arXiv 2509.24837, CVPR 2026).

How strongly the projector's output reacts to a small change of a token is estimated by symmetric finite differences
along random directions. Greedy picks of the largest sensitivity times distance to the tokens already picked follow,
crop by crop, before the LLM. Newline tokens stay, on top of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from zoo.engines.crops import feature_layer
from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.reductions import Keep
from zoo.engines.selection import proportional_shares, weighted_farthest_points
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy


@dataclass(frozen=True)
class Projector:
    """``last(activation(first(norm(x))))``; tokens are perturbed between ``norm`` and ``first``."""

    norm: nn.Module | None
    first: nn.Linear
    activation: nn.Module
    last: nn.Linear


@register("zoo-prune")
class ZooPrune(KeepsShare, VisualTokenReducer):
    """Keeps ``int(keep_ratio * N)`` visual tokens to which the projector is sensitive and which are far apart."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.1112,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays (the paper's ratio); of tiled pictures, of all patches "
        "before padding is cut off, newline tokens not counted.",
    )
    directions: int = Field(
        64, ge=1, description="Random directions, the same for all tokens (the paper's m)."
    )
    step: float = Field(0.01, gt=0, description="Length of the perturbation (the paper's h).")
    rank: int | None = Field(
        None,
        ge=1,
        description="Rank to which the projector's last layer is reduced for the estimate, which is then faster and "
        "less exact (a summary of the paper has 128); none = the whole layer.",
    )
    seed: int = Field(0, ge=0, description="Seed of the random directions.")

    def count(self, tokens: int) -> int:
        """``int(keep_ratio * tokens)``, at least 1, or ``keep_tokens``."""
        return max(1, int(self.keep_ratio * tokens)) if self.keep_tokens is None else super().count(tokens)

    def check(self, loaded: LoadedModel) -> None:
        """Refuse what the family refuses, and projectors that are not a two-layer MLP."""
        super().check(loaded)
        self._projector(loaded.anatomy)

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer, which looks at what the projector reads."""
        if self.keeps_all:
            return []
        projector, layer = self._projector(anatomy), feature_layer(anatomy)
        if self.rank is not None:
            projector = replace(projector, last=low_rank(projector.last, self.rank, self.seed))
        watch = EncoderWatch(layer, attention=False, hidden=True)
        select = partial(self.select, projector=projector, layer=layer)
        return [Stage(-1, select, observes_encoder=(watch,), seed=self.seed)]

    def select(self, view: View, projector: Projector, layer: int) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        sampled = unit_directions(self.directions, projector.first.in_features, view.generator)
        nominal = [nominal_tokens(image) for image in view.images]
        shares = proportional_shares(self.count(sum(nominal)), nominal)
        kept = []
        for image, share in zip(view.images, shares, strict=True):
            rows = projector_inputs(image, projector, layer)
            scores = sensitivity(rows.flatten(0, -2), projector, sampled, self.step)
            if rows.dim() == 3:
                scores = image.on_tokens(scores.view(rows.shape[:2]))
            owner = image.crop
            crops = [own for own in (owner == number for number in range(image.crops)) if bool(own.any())]
            kept.append(image.tokens[owner < 0])
            for own in crops:
                tokens = image.tokens[own]
                count = min(len(tokens), max(1, share // len(crops)))
                kept.append(tokens[self.order(view.tokens[tokens], scores[own], count)])
        return keep(torch.cat(kept))

    def order(self, projected: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the kept rows of ``projected [N, D]`` with sensitivity ``scores [N]``, in the order of picking."""
        low, high = scores.aminmax()
        weight = (scores - low) / (high - low + 1e-8)
        return weighted_farthest_points(projected, weight.where(high > low, 1.0), count)

    def _projector(self, anatomy: Anatomy) -> Projector:
        """Norm (if any), linear, activation, linear: read off the projector's modules in their order."""
        modules = () if anatomy.projector is None else anatomy.projector.modules()
        leaves = [module for module in modules if next(module.children(), None) is None]
        norm = leaves.pop(0) if len(leaves) == 4 else None
        if len(leaves) == 3 and not isinstance(anatomy.feature_layer, list):
            first, activation, last = leaves
            if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
                return Projector(norm, first, activation, last)
        raise refuse(
            self,
            "a projector of two linear layers (one alone is equally sensitive to all tokens) on one encoder layer",
            f"another kind in the architecture {anatomy.description}",
        )


def projector_inputs(image: ImageView, projector: Projector, layer: int) -> torch.Tensor:
    """What enters the first linear layer: ``[crops, P, D]``, or ``[n, k D]`` where it takes k patches of a token."""
    states, norm = image.encoder_hidden(layer)[:, image.prefix :], projector.norm
    if norm is not None and next(norm.parameters()).shape[-1] == states.shape[-1]:
        states, norm = norm(states), None
    if states.shape[-1] == projector.first.in_features:
        return states
    rows = states.flatten(0, 1)[image.patches.to(states.device)].flatten(1)
    return rows if norm is None else norm(rows)


def nominal_tokens(image: ImageView) -> int:
    """Tokens of a picture that its budget refers to: all patches of tiled pictures, as if no padding were cut off."""
    one_to_one = image.patches.shape[1] == 1
    return image.crops * image.patches_per_crop if one_to_one else int((image.crop >= 0).sum())


def unit_directions(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Random directions of length 1, ``[count, width]`` float32 on the CPU."""
    sampled = torch.randn(count, width, generator=generator)
    return sampled / (sampled.norm(dim=-1, keepdim=True) + 1e-12)


@torch.no_grad()
def sensitivity(x: torch.Tensor, projector: Projector, directions: torch.Tensor, step: float) -> torch.Tensor:
    """``mean_j |M(x + h u_j) - M(x - h u_j)| / 2h`` for the projector ``M``, float32.

    The first layer is linear, so ``W1 (x + h u) = W1 x + h W1 u``: one product for the tokens and one for the
    directions. The last layer takes the difference, and its bias cancels. In half precision the difference would be
    rounding noise.

    Args:
        x: what enters the first linear layer, ``[N, D]``.
        projector: its norm is not applied.
        directions: unit vectors ``[m, D]``.
        step: ``h``.

    Returns:
        ``[N]``.
    """
    first, last, activation = projector.first, projector.last, projector.activation
    bias = None if first.bias is None else first.bias.float()
    base = nn.functional.linear(x.float(), first.weight.float(), bias)
    shifts = step * nn.functional.linear(directions.to(base), first.weight.float())
    weight = last.weight.float()
    total = base.new_zeros(len(x))
    for chunk in shifts.split(max(1, 4096 // len(x))):  # some thousand rows at a time
        moved = chunk.unsqueeze(1)
        change = activation(base + moved) - activation(base - moved)
        total += (change @ weight.T).norm(dim=-1).sum(0)
    return total / (2 * step * len(directions))


@torch.no_grad()
def low_rank(layer: nn.Linear, rank: int, seed: int) -> nn.Linear:
    """A narrower layer without bias, whose outputs are nearly as long as those of ``layer`` (without its bias).

    It has the ``rank`` largest singular directions, by a randomised range finder with two power iterations (Halko et
    al., arXiv 0909.4061, Alg. 4.4 and 5.1).
    """
    weight = layer.weight.float()
    rank = min(rank, *weight.shape)
    start = torch.randn(
        weight.shape[1], min(rank + 8, *weight.shape), generator=torch.Generator().manual_seed(seed)
    )
    basis = torch.linalg.qr(weight @ start.to(weight)).Q
    for _ in range(2):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    _, values, directions = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    narrow = nn.Linear(weight.shape[1], rank, bias=False, device=weight.device)
    narrow.weight.copy_(values[:rank, None] * directions[:rank])
    return narrow
