"""Information Horizon: When Token Pruning is Worse than Random (arXiv 2512.07580, CVPR 2026).

The information of a visual token at layer i is what it alone adds to the probability of the true answer when all
other visual tokens leave there. It becomes uniform and vanishes at some depth, the horizon: from there on a random
choice is as good as any. The method prunes at random in one deep layer, and is meant to be stacked on a pruner of the
first layers, as in ``divprune+information-horizon``. ``InformationHorizon.fit`` measures the horizon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from random import Random
from typing import Any, ClassVar

import torch
from pydantic import Field

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.methods.visual_tokens._token_information import common_horizon, token_information
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy


@register("information-horizon")
class InformationHorizon(KeepsShare, VisualTokenReducer):
    """Keeps a random subset of the visual tokens that reach one deep layer."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.134,
        gt=0,
        le=1,
        description="Fraction that stays of the visual tokens reaching `layer` (the paper keeps 38 of DivPrune's 284).",
    )
    keep_tokens: int | None = Field(
        None, ge=0, description="Number of visual tokens that stay, 0 = none; replaces keep_ratio."
    )
    layer: int | None = Field(
        None,
        ge=1,
        description="First decoder layer that runs short, counted from 0. None = 5/8 of the depth: the paper's layer "
        "20 of 32.",
    )
    seed: int = Field(0, ge=0, description="Seed of the draw.")

    @classmethod
    def fit(
        cls,
        loaded: LoadedModel,
        samples: Iterable[Mapping[str, Any]],
        *,
        threshold: float = 1e-3,
        window: int = 2,
        **parameters: Any,
    ) -> InformationHorizon:
        """The method at the horizon of ``loaded``.

        The paper asks for the probability of the true answer. Samples here have none: what the whole prompt makes most
        probable stands for it.

        Args:
            loaded: a vision-language model, without hooks of other methods.
            samples: inputs of one sample each, as the processor makes them.
            threshold: mean information, over tokens and samples, below which a layer lies behind the horizon.
            window: tokens that stay together form squares of this side; 1 = every token by itself.
            parameters: other fields of the method.

        Raises:
            BadInput: no sample, or every layer tells more than ``threshold``.
        """
        found = [token_information(loaded, sample, window=window) for sample in samples]
        return cls(layer=common_horizon(found, threshold), **parameters)

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage in front of the deep layer."""
        assert anatomy.decoder is not None
        layer = max(1, len(anatomy.decoder.layers) * 5 // 8) if self.layer is None else self.layer
        return [] if self.keeps_all else [Stage(layer, self.select, seed=self.seed)]

    def select(self, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        number = len(view.tokens)
        return keep(
            random_choice(number, self.count(number), view.generator.initial_seed()).to(view.index.device)
        )


def random_choice(tokens: int, number: int, seed: int) -> torch.Tensor:
    """``number`` of ``tokens`` places drawn without replacement by Python's own generator, ``[number]``."""
    # Not torch's: the release draws with ``random.sample``, and a seed shall give the same tokens as there.
    rng = Random(seed)  # noqa: S311 - nothing secret is drawn
    return torch.tensor(rng.sample(range(tokens), number), dtype=torch.long)
