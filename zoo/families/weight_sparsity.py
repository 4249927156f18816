"""Sparse weights: linear layers keep their shape, some of their weights become zero."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from zoo.engines.statistics import Observer, Watch
from zoo.engines.surgery import replace_weights
from zoo.families.layer_budget import LayerBudget
from zoo.families.weights import Facts, Work
from zoo.models.anatomy import Decoder, DecoderLayer, LinearPart


class WeightSparsifier(LayerBudget):
    """Base of methods that set single weights to zero, layer by layer.

    ``sparsity`` is canonical: the fraction of zeros among the weights of all linear layers in the decoder.
    """

    unit: ClassVar[str] = "non-zero decoder weights"
    sequential: ClassVar[bool] = True
    """Whether a layer is measured on what leaves the layers before it when these are sparse already."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="Fraction of decoder weights to set to zero.")
    pattern: str | None = Field(
        None,
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description="n:m, such as 2:4: of every m weights along the input, n stay. Takes the place of sparsity.",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> WeightSparsifier:
        if self.group is not None:
            if self.group[0] > self.group[1]:
                raise ValueError(
                    f"a pattern n:m keeps n of m weights, so n is at most m (given: {self.pattern})"
                )
            if "sparsity" in self.model_fields_set:
                raise ValueError("give sparsity or pattern, not both")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """``(n, m)`` of the pattern; ``None`` when weights leave anywhere."""
        if self.pattern is None:
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    @property
    def target(self) -> float:
        """Fraction of zeros asked for, by ``sparsity`` or ``pattern``."""
        return self.sparsity if self.group is None else 1 - self.group[0] / self.group[1]

    def group_at(self, sparsity: float) -> tuple[int, int] | None:
        """The pattern with which a layer of this sparsity comes nearest to it (at least one of m stays)."""
        return self.group and (max(1, round((1 - sparsity) * self.group[1])), self.group[1])

    def observer(self, inputs: int) -> Observer | None:
        """What to accumulate over one linear layer's input of ``inputs`` channels; ``None`` to read no text at all."""
        return None

    @abstractmethod
    def sparsify(self, part: LinearPart, seen: Any, sparsity: float) -> torch.Tensor:
        """The new weight ``[out, in]`` of ``part``, given its input's observer (which linears may share), if any."""

    def sparsify_layer(self, layer: DecoderLayer, seen: Mapping[str, Any], sparsity: float) -> None:
        """Replace the weights of one layer, given the observers by name of the input."""
        replace_weights(
            (part, self.sparsify(part, seen.get(name), sparsity))
            for name, parts in layer.by_input.items()
            for part in parts
        )

    def facts(self, sparsities: Sequence[float]) -> Facts:
        """The paper's own figures."""
        return {}

    @torch.no_grad()
    def transform_layers(self, work: Work, sparsities: Sequence[float]) -> Facts:
        """Measure a layer, sparsify it, run it again, go on; or measure all layers first."""
        decoder = work.decoder
        count = len(decoder.layers)

        def observe(layer: DecoderLayer) -> dict[str, Watch]:
            observers = {
                name: (parts[0], self.observer(parts[0].linear.in_features))
                for name, parts in layer.by_input.items()
            }
            return {name: Watch(part, one) for name, (part, one) in observers.items() if one is not None}

        def sparsify(index: int, seen: Mapping[str, Any]) -> None:
            self.sparsify_layer(decoder.layers[index], seen, sparsities[index])

        reads_text = bool(observe(decoder.layers[0]))
        if reads_text and self.sequential:
            work.observe(observe, sparsify)
        else:
            for index, seen in enumerate(work.observe(observe) if reads_text else [{}] * count):
                sparsify(index, seen)
                work.step(index + 1, count)
        return self.facts(sparsities)

    def remaining(self, decoder: Decoder) -> int:
        """Weights of the linear layers that are not zero."""
        return sum(nonzero_weights(layer) for layer in decoder.layers)

    def widths(self, layer: DecoderLayer) -> dict[str, int]:
        """One bar per layer."""
        return {"non-zero weights": nonzero_weights(layer)}


def nonzero_weights(layer: DecoderLayer) -> int:
    """How many weights of the layer's linears are not zero."""
    return sum(int(torch.count_nonzero(part.weight)) for part in layer.linears)
