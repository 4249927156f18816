"""OWL: layers with more outliers keep more of their weights.

Yin et al.: Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity, ICML
2024 (arXiv 2310.05175). It says how much of each layer leaves, not what: another method, the host, does the pruning.
The outliers of a layer are the weights whose Wanda score exceeds ``M`` times the layer's mean; their share is mapped
linearly to a band of sparsities around the global one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from zoo.engines.budgets import round_keeping_sum
from zoo.engines.statistics import SquareSum, Watch
from zoo.errors import BadParameter
from zoo.families.layer_budget import LayerBudget
from zoo.families.weights import Facts, WeightMethod, Work
from zoo.interface import method, register
from zoo.methods.weights.wanda import importance
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer


def outlier_percent(scores: list[torch.Tensor], multiple: float) -> float:
    """How many of all ``scores`` of a layer exceed ``multiple`` times their common mean, in percent (Eq. 1)."""
    count = sum(part.numel() for part in scores)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in scores) / count
    return 100 * sum(int((part > multiple * mean).sum()) for part in scores) / count


def layer_sparsities(percents: torch.Tensor, sparsity: float, band: float) -> torch.Tensor:
    """Outlier percentages as sparsities, both ``[layers]`` float64.

    The layer with most outliers is pruned ``2 * band`` less than the one with fewest, and the mean is ``sparsity``, as
    in the authors' code; values may lie outside of [0, 1]. Layers that are all alike are treated alike.
    """
    spread = percents.max() - percents.min()
    bonus = (percents - percents.min()) / torch.where(spread > 0, spread, 1.0) * 2 * band
    return sparsity - bonus + bonus.mean()


@register("owl")
class Owl(WeightMethod):
    """A layer-wise budget for a method that takes one, such as wanda, sparsegpt, magnitude or wanda-sp."""

    unit: ClassVar[str] = "non-zero decoder weights"

    sparsity: float = Field(0.7, ge=0, lt=1, description="Mean fraction of weights that leave, over layers.")
    multiple: float = Field(
        5.0, gt=0, description="M: an outlier exceeds the mean score of its layer so often."
    )
    band: float = Field(
        0.08, ge=0, lt=0.5, description="Lambda: half the distance of the lowest and the highest sparsity."
    )
    host: str = Field("wanda", description="The method that prunes each layer.")
    host_parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of that method, by name; not its budget."
    )
    group: int | None = Field(
        None,
        ge=2,
        description="n:m patterns with this m (the code has 8), and an n of its own for each layer; armor needs it.",
    )

    @field_validator("host_parameters")
    @classmethod
    def _one_budget(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.keys() & {"sparsity", "pattern", "ratio"}:
            raise ValueError("the budget is OWL's: set sparsity, and group for n:m patterns")
        return given

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return self.sparsity == 0

    @property
    def hosting(self) -> LayerBudget:
        """The method that prunes, with its share of a uniform budget.

        Raises:
            BadInput: there is no such method, it takes no budget for each layer, or no n:m patterns where these are
                asked for.
        """
        kept = None if self.group is None else max(1, round((1 - self.sparsity) * self.group))
        budget = {"sparsity": self.sparsity} if kept is None else {"pattern": f"{kept}:{self.group}"}
        host = method(self.host, **budget, **self.host_parameters)
        if not isinstance(host, LayerBudget):
            raise BadParameter(
                f"{self.host} takes no sparsity for each layer; methods that do: wanda, sparsegpt, magnitude, "
                "armor, wanda-sp, magnitude-sp"
            )
        return host

    def check(self, loaded: LoadedModel) -> None:
        """Ask the host as well."""
        super().check(loaded)
        self.hosting.check(loaded)

    @torch.no_grad()
    def budget(self, work: Work) -> list[float]:
        """The sparsity of each layer, from one pass through the dense model.

        Raises:
            BadParameter: a layer would lose everything.
        """

        def observe(layer: DecoderLayer) -> dict[str, Watch]:
            return {name: Watch(parts[0], SquareSum()) for name, parts in layer.by_input.items()}

        percents = [
            outlier_percent(
                [
                    importance(part.weight, seen[n].mean)
                    for n, parts in layer.by_input.items()
                    for part in parts
                ],
                self.multiple,
            )
            for layer, seen in zip(work.decoder.layers, work.observe(observe), strict=True)
        ]
        sparsities = layer_sparsities(torch.tensor(percents, dtype=torch.float64), self.sparsity, self.band)
        if float(sparsities.max()) >= 1:
            raise BadParameter(
                f"owl: layer {int(sparsities.argmax())} would lose all of its weights; lower sparsity "
                f"({self.sparsity}) or band ({self.band})"
            )
        kept = 1 - sparsities.clamp(min=0)
        if self.group is not None:
            kept = round_keeping_sum(kept * self.group) / self.group
        return (1 - kept).tolist()

    def transform(self, work: Work) -> Facts:
        """Share out the budget, and let the host spend it."""
        sparsities = self.budget(work)
        facts = self.hosting.transform_layers(work, sparsities)
        return facts | {
            "host": self.host,
            "sparsity of the densest layer": round(min(sparsities), 6),
            "sparsity of the sparsest layer": round(max(sparsities), 6),
        }

    def remaining(self, decoder: Decoder) -> int:
        """As the host counts."""
        return self.hosting.remaining(decoder)

    def widths(self, layer: DecoderLayer) -> dict[str, int]:
        """The host's bars."""
        return self.hosting.widths(layer)
