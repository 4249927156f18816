"""Layer lottery: remove whole layers before any training, then train the shallow network.

When Layers Play the Lottery, all Tickets Win at Initialization (arXiv 2301.10835, 2023). Algorithm 2: draw the weights
``theta``, take the gradient ``g`` of the loss on a labelled batch, score every weight, and a layer by the sum over its
weights; the lowest layers leave in one shot and the rest is trained from ``theta``. SNIP scores ``|theta g|``; GraSP,
as the paper words it, keeps the sign: ``theta g``, so that the most negative go first. The original GraSP,
``-theta (H g)`` with the Hessian ``H`` over the layers' weights, can be chosen too.

The paper prunes residual networks for pictures. Every layer of a decoder keeps the shape of its input, so all are
candidates here; the labels are the next tokens. ``zoo run`` prunes, ``zoo train`` goes on to train the ticket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.curvature import hessian_product, loss_gradient
from zoo.engines.initialisation import draw_initial_weights
from zoo.engines.stepping import moved
from zoo.engines.surgery import Block
from zoo.engines.training import Recipe
from zoo.errors import RunFailed
from zoo.families.layer_removal import LayerRemover
from zoo.families.retraining import Retraining
from zoo.families.weights import AppliedPruning, Facts, Work
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder
from zoo.training import Lesson, Setting


@register("layer-lottery")
class LayerLottery(LayerRemover, Retraining):
    """Layer pruning at initialisation."""

    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=6e-4, warmup=0.05, final=0.1, betas=(0.9, 0.95), weight_decay=0.1, batch=8
    )

    sparsity: float = Field(
        0.2, ge=0, lt=1, description="Fraction of decoder layers to remove, rounded to whole layers."
    )
    criterion: Literal["grasp", "grasp-hessian", "snip", "random"] = Field(
        "grasp",
        description="Score of a weight: signed product with its gradient, by the Hessian, or absolute.",
    )
    aggregate: Literal["sum", "mean"] = Field(
        "sum", description="Score of a layer from those of its weights."
    )
    weights: Literal["initial", "given", "rewound"] = Field(
        "initial",
        description="Score and keep newly drawn weights (pruning at initialisation); the model's own; or score its own "
        "and draw those that stay anew (pruning after training).",
    )
    windows: int = Field(8, ge=1, description="How many of the calibration windows are the labelled batch.")

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero and the model's own weights stay."""
        return self.weights == "given" and super().removes_nothing

    def scores(self, decoder: Decoder, windows: torch.Tensor, batch: int = 8) -> torch.Tensor:
        """Score of each layer ``[layers]`` float64; lowest leaves.

        Args:
            decoder: left as it is.
            windows: the labelled batch ``[windows, tokens]``.
            batch: windows per pass.

        Raises:
            RunFailed: a score is not finite.
        """
        layers = [list(layer.module.parameters()) for layer in decoder.layers]
        flat, ids = list(chain.from_iterable(layers)), windows.to(decoder.embed.weight.device)
        found = loss_gradient(decoder, flat, ids, batch)
        if self.criterion == "grasp-hessian":
            found = [-part for part in hessian_product(decoder, flat, ids, batch, found)]
        totals, rest = [], iter(found)
        for parameters in layers:
            products = [parameter.detach() * next(rest) for parameter in parameters]
            score = sum(float((p.abs() if self.criterion == "snip" else p).double().sum()) for p in products)
            totals.append(score / (sum(p.numel() for p in products) if self.aggregate == "mean" else 1))
        if not all(map(math.isfinite, totals)):
            raise RunFailed("the gradient is NaN or infinite; load the model in float32 or bfloat16")
        return torch.tensor(totals, dtype=torch.float64)

    def choose(self, work: Work) -> list[Block]:
        """The layers of lowest score, lowest first; of equal ones the first."""
        decoder = work.decoder
        total = len(decoder.layers)
        if self.criterion == "random":
            scores = torch.rand(total, generator=work.generator())
        else:
            device = decoder.embed.weight.device if work.device is None else torch.device(work.device)
            with moved(work.model, device):
                scores = self.scores(decoder, work.windows[: self.windows], work.batch)
        return [Block(int(index)) for index in scores.argsort(stable=True)[: self.count(total)]]

    def transform(self, work: Work) -> Facts:
        """Draw, choose, remove."""
        if self.weights == "initial":
            draw_initial_weights(work.model, work.seed)
        facts = super().transform(work)
        if self.weights == "rewound":
            draw_initial_weights(work.model, work.seed)
        trained = "the model's own" if self.weights == "given" else "drawn anew, to be trained"
        return {**facts, "weights": trained}

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Prune, then train everything that is left, as any network is trained.

        Raises:
            BadInput: the model has no tokenizer.
        """
        return self.lesson(loaded, examples, heldout, setting)

    def begin(
        self, loaded: LoadedModel, setting: Setting
    ) -> tuple[LoadedModel, Callable[[], AppliedPruning]]:
        """The ticket."""
        applied = self.apply(
            loaded,
            calibration=setting.calibration,
            samples=setting.windows,
            seed=setting.seed,
            progress=partial(setting.progress, "pruning"),
        )
        return applied.loaded, lambda: applied
