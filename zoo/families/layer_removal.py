"""Depth methods: whole decoder layers leave, or only the attention or the feed-forward part of some."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

from pydantic import Field

from zoo.engines.surgery import Block, remove_blocks
from zoo.errors import BadParameter
from zoo.families.weights import Facts, WeightMethod, Work


class LayerRemover(WeightMethod):
    """Base of methods that choose which layers leave.

    ``sparsity`` is canonical: the fraction of the decoder's layers (all of one size in a dense model, so of its
    weights too), rounded to a whole number of them. ``layers`` says how many directly.
    """

    sparsity: float = Field(
        0.25, ge=0, lt=1, description="Fraction of decoder layers to remove, rounded to whole layers."
    )
    layers: int | None = Field(
        None, ge=0, description="How many layers to remove; takes the place of sparsity."
    )

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return (self.sparsity if self.layers is None else self.layers) == 0

    def count(self, total: int) -> int:
        """How many of ``total`` units (layers, or whatever the method removes) leave.

        Raises:
            BadParameter: that would leave none.
        """
        count = round(self.sparsity * total) if self.layers is None else self.layers
        if count >= total:
            raise BadParameter(
                f"{self.slug} shall remove {count} of {total}; at least one must stay: ask for fewer"
            )
        return count

    @abstractmethod
    def choose(self, work: Work) -> Collection[Block]:
        """What leaves: ``Block(index)`` for a layer, ``Block(index, "attention")`` or ``"mlp"`` for a part of it.

        The model must be as it was when this returns: try layers out with hooks that are undone.
        """

    def facts(self, blocks: Collection[Block]) -> Facts:
        """The paper's own figures, given what ``choose`` returned."""
        return {}

    def transform(self, work: Work) -> Facts:
        """Choose, remove."""
        blocks = self.choose(work)
        remove_blocks(work.decoder, blocks)
        return {
            "removed": ", ".join(str(block) for block in sorted(blocks)) or "nothing",
            **self.facts(blocks),
        }
