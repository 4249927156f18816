"""Methods that score coupled groups of weights and remove the lowest heads and channels of all layers together.

Scores of all groups are taken before anything is cut. How many units leave is settled group by group (``local``) or by
one threshold over several groups; in several steps, scores are taken anew after each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator

from zoo.engines.budgets import above_lowest, cost_threshold, keep_one
from zoo.engines.coupling import Group, Kind, layer_groups
from zoo.engines.surgery import LayerCut, cut_layers
from zoo.errors import BadParameter
from zoo.families.weights import Facts, WeightMethod, Work
from zoo.models.anatomy import Decoder


@dataclass(frozen=True)
class Size:
    """What a group has before anything leaves: units, their channels, and weights that leave with each."""

    kind: Kind
    layer: int
    units: int
    block: int
    unit_weights: int

    @property
    def weights(self) -> int:
        """Weights of the whole group."""
        return self.units * self.unit_weights


class GroupPruner(WeightMethod):
    """Base of methods that remove key-value groups (with their query heads) and feed-forward channels by score.

    The published ``ratio`` is one of units, heads and channels alike, and rounded as each paper does. ``sparsity`` is
    one of weights: in the local ranking heads are rounded down, and channels of the layer make up for it.
    """

    sparsity: float = Field(0.2, ge=0, lt=1, description="Fraction of decoder-layer weights to remove.")
    ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="The published pruning ratio, of heads and channels of each pruned layer; in place of sparsity.",
    )
    ranking: Literal["local", "isomorphic", "global"] = Field(
        "local",
        description="Rank units within their group, among groups of one kind (isomorphic) or among all of them.",
    )
    steps: int = Field(1, ge=1, description="Prune in so many steps of equal size, with new scores in each.")

    @model_validator(mode="after")
    def _one_budget(self) -> GroupPruner:
        if self.ratio is not None and "sparsity" in self.model_fields_set:
            raise ValueError("give sparsity (of the decoder's weights) or ratio (of units), not both")
        return self

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return (self.sparsity if self.ratio is None else self.ratio) == 0

    @abstractmethod
    def score(self, work: Work, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Score of each unit of each group, ``[units]`` float32; the lowest leave."""

    @abstractmethod
    def units_removed(self, size: Size, ratio: float) -> int:
        """How many units of a group the published ``ratio`` removes."""

    def pruned_layers(self, decoder: Decoder) -> Sequence[int]:
        """Which layers are pruned: all, unless overridden."""
        return range(len(decoder.layers))

    def share(self, decoder: Decoder, sizes: Sequence[Size]) -> float:
        """The budget as a fraction of what the pruned groups hold: of their units by ``ratio``, else of their weights.

        Raises:
            BadParameter: they hold fewer weights than shall leave.
        """
        if self.ratio is not None:
            return self.ratio
        total, pruned = decoder.prunable_parameters(), sum(size.weights for size in sizes)
        due = self.due(decoder) * total
        if due >= pruned:
            raise BadParameter(
                f"{self.slug} prunes layers that hold {pruned / total:.0%} of the decoder's weights: sparsity must be "
                f"below {pruned / total:.4f} (given: {self.sparsity})"
            )
        return due / pruned

    def due(self, decoder: Decoder) -> float:
        """Fraction of the decoder's weights that shall leave with heads and channels: all of the budget."""
        return self.sparsity

    def transform(self, work: Work) -> Facts:
        """Score, choose, cut; as often as there are steps."""
        decoder = work.decoder
        layers = self.pruned_layers(decoder)
        dense = sizes_of(layer_groups(decoder, layers))
        share = self.share(decoder, dense)
        for step in range(1, self.steps + 1):
            groups = layer_groups(work.decoder, layers)
            with torch.no_grad():
                scores = self.score(work, groups)
                kept = self.choose(groups, scores, dense, share * step / self.steps)
            cut_groups(work.decoder, groups, kept)
            work.step(step, self.steps)
        left = sizes_of(layer_groups(work.decoder, layers))
        gone = [(old.kind, old.units - new.units) for old, new in zip(dense, left, strict=True)]
        return {
            "key-value groups removed": sum(count for kind, count in gone if kind == "attention"),
            "FFN channels removed": sum(count for kind, count in gone if kind == "mlp"),
        }

    def choose(
        self, groups: Sequence[Group], scores: Sequence[torch.Tensor], dense: Sequence[Size], share: float
    ) -> list[torch.Tensor]:
        """Which units stay, a mask ``[units]`` per group; at least one of each.

        Args:
            groups: as they are now.
            scores: of their units.
            dense: what the groups had at first.
            share: as from ``share``, of what they had at first.
        """
        if self.ranking == "local":
            removed = self._removed_locally(dense, share)
            return [
                _without_lowest(score, count - (size.units - group.units))
                for score, count, size, group in zip(scores, removed, dense, groups, strict=True)
            ]
        kept: list[torch.Tensor] = list(scores)
        for kind in ("attention", "mlp") if self.ranking == "isomorphic" else (None,):
            pool = [index for index, group in enumerate(groups) if kind in (None, group.kind)]
            pooled = torch.cat([scores[index] for index in pool])
            above = self._above(pooled, [(groups[index], dense[index]) for index in pool], share)
            masks = above.split([len(scores[index]) for index in pool])
            for index, mask in zip(pool, masks, strict=True):
                kept[index] = keep_one(mask, scores[index])
        return kept

    def _above(self, scores: torch.Tensor, pool: Sequence[tuple[Group, Size]], share: float) -> torch.Tensor:
        """Units above one threshold for all groups of a pool, a mask of the shape of ``scores``."""
        units = sum(size.units for _, size in pool)
        if self.ratio is not None:
            return above_lowest(scores, units - int(units * (1 - share)) - (units - len(scores)))
        costs = torch.cat([torch.full((group.units,), group.unit_weights) for group, _ in pool])
        wanted = (1 - share) * sum(size.weights for _, size in pool)
        return scores > cost_threshold(scores, costs.to(scores.device), 1 - wanted / int(costs.sum()))

    def _removed_locally(self, dense: Sequence[Size], share: float) -> list[int]:
        """How many units of each group leave, of those it had at first.

        Raises:
            BadParameter: a layer would lose all of its channels.
        """
        if self.ratio is not None:
            return [min(size.units - 1, self.units_removed(size, share)) for size in dense]
        heads = {size.layer: int(size.units * share) for size in dense if size.kind == "attention"}
        counts = []
        for size in dense:
            if size.kind == "attention":
                counts.append(heads[size.layer])
                continue
            # What the layer's heads leave of its budget.
            beside = next((s for s in dense if s.layer == size.layer and s.kind == "attention"), None)
            due = share * size.weights
            if beside is not None:
                due += share * beside.weights - heads[size.layer] * beside.unit_weights
            counts.append(round(due / size.unit_weights))
            if counts[-1] >= size.units:
                raise BadParameter(
                    f"{self.slug}: heads leave in few groups, so this budget would take all channels of layer "
                    f"{size.layer}; lower it"
                )
        return counts


def sizes_of(groups: Sequence[Group]) -> list[Size]:
    """What the groups have now."""
    return [Size(group.kind, group.layer, group.units, group.block, group.unit_weights) for group in groups]


def cut_groups(decoder: Decoder, groups: Sequence[Group], kept: Sequence[torch.Tensor]) -> None:
    """Remove what is not in the masks ``[units]`` of attention and feed-forward groups."""
    heads = {group.layer: mask for group, mask in zip(groups, kept, strict=True) if group.kind == "attention"}
    channels = {group.layer: mask for group, mask in zip(groups, kept, strict=True) if group.kind == "mlp"}
    cuts = []
    for index, layer in enumerate(decoder.layers):
        mask = heads.get(index)
        query_heads = None if mask is None else mask.repeat_interleave(layer.attention.group)
        cuts.append(LayerCut(query_heads, channels.get(index)))
    cut_layers(decoder, cuts)


def _without_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask without exactly ``count`` of ``scores [n]``, the lowest; of equal ones the first."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[scores.argsort(stable=True)[: max(0, count)]] = False
    return mask
