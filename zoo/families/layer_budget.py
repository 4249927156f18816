"""Weight methods whose budget may differ from layer to layer, so that another method can share it out (OWL)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from zoo.families.weights import Facts, WeightMethod, Work


class LayerBudget(WeightMethod):
    """Base of methods that treat the layers one after the other, each with a sparsity of its own.

    Alone they give all layers the same.
    """

    @property
    @abstractmethod
    def target(self) -> float:
        """Fraction of the weights of every layer that leaves."""

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return self.target == 0

    @abstractmethod
    def transform_layers(self, work: Work, sparsities: Sequence[float]) -> Facts:
        """As ``transform``, with the fraction to remove of each layer, ``[layers]``."""

    def transform(self, work: Work) -> Facts:
        """The same for all layers."""
        return self.transform_layers(work, [self.target] * len(work.decoder.layers))
