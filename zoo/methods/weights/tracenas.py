"""TraceNAS: search a shallower and narrower decoder whose gradients go along with those of the dense one.

TraceNAS: Zero-shot LLM Pruning via Gradient Trace Correlation (arXiv 2602.02891, 2026). Architectures of one size,
some blocks left out and the others narrowed, evolve; none of them is trained. Each is scored by the correlation, block
by block, of the gradients of its loss with those of the dense model on the same text. The best one is cut out of the
dense model and must then go through continued pre-training, for which there is ``zoo train``.

The released search accepts what lies in a window of parameter counts; here every architecture is brought to the budget,
so that the result has the size that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from zoo.engines.evolution import Dice, distinct, fittest
from zoo.engines.statistics import SquareSum, Watch
from zoo.engines.stepping import moved
from zoo.engines.surgery import Block, keep_channels, keep_heads, remove_blocks
from zoo.engines.training import Recipe
from zoo.errors import BadInput, BadParameter
from zoo.families.continued_training import ContinuedTraining
from zoo.families.weights import Facts, Work
from zoo.interface import refuse, register
from zoo.methods.weights._tracenas_space import Architecture, Space, parts_of
from zoo.methods.weights._tracenas_traces import Traces
from zoo.models import LoadedModel
from zoo.models.anatomy import DecoderLayer

BEST_PARENT, CROSSOVER = 0.4, 0.7
"""Probability that the best of all is a first parent, and that there are two parents."""


@register("tracenas")
class TraceNAS(ContinuedTraining):
    """Evolutionary search by gradient traces, then continued pre-training."""

    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-4, warmup=0.05, schedule="stable-decay", betas=(0.9, 0.95), weight_decay=0.1
    )

    sparsity: float = Field(0.3, ge=0, lt=1, description="Fraction of decoder-layer weights to remove.")
    width: float = Field(
        0.28,
        gt=0,
        le=1,
        description="Fraction of its heads or channels that a block keeps at least, if it stays.",
    )
    depth: float = Field(
        0.85,
        gt=0,
        le=1,
        description="Fraction of attention blocks, and of feed-forward blocks, that stay at least.",
    )
    windows: int = Field(16, ge=1, description="How many of the calibration windows gradients are taken on.")
    population: int = Field(32, ge=2, description="Architectures compared in each iteration.")
    elites: int = Field(8, ge=1, description="How many of them become parents, and stay.")
    iterations: int = Field(10, ge=0, description="Of the search.")
    adapter_rank: int | None = Field(
        None,
        ge=1,
        description="Compare gradients of random LoRA adapters of this rank (released: 64) in place of those of the "
        "weights, which take as much memory as the model.",
    )

    @model_validator(mode="after")
    def _some_are_new(self) -> TraceNAS:
        if self.elites >= self.population:
            raise ValueError("elites must be fewer than population, so that new architectures are tried")
        return self

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return self.sparsity == 0

    def check(self, loaded: LoadedModel) -> None:
        """As all weight methods; and the gradient is that of a next-token loss.

        Raises:
            Refused: the model has no LM head.
        """
        super().check(loaded)
        assert loaded.anatomy.decoder is not None
        if loaded.anatomy.decoder.head is None:
            raise refuse(self, "an LM head", "none")

    def evolve(self, space: Space, traces: Traces, work: Work) -> tuple[Architecture, float, int]:
        """The best architecture found, its score, and how many were compared.

        Raises:
            BadParameter: the space holds no architecture of that size.
        """
        dice = Dice(work.generator())
        scores: dict[Architecture, float] = {}
        total = self.population + self.iterations * (self.population - self.elites)

        def cost(kept: Architecture) -> float:
            if kept not in scores:
                scores[kept] = traces.score(masks_of(space, kept))
                work.step(len(scores), total)
            return -scores[kept]

        def child() -> Architecture | None:
            first = elites[0] if dice.chance(BEST_PARENT) else dice.choice(elites)
            return space.child(first, dice.choice(elites), dice.chance(CROSSOVER), dice)

        found = distinct(lambda: space.random(dice), self.population)
        if not found:
            raise BadParameter(
                f"{self.slug}: with width {self.width} and depth {self.depth} no architecture of this model has a "
                f"sparsity of {self.sparsity:.4g}; lower them, or the sparsity"
            )
        elites = [kept for kept, _ in fittest(found, cost, self.elites)]
        for _ in range(self.iterations):
            new = distinct(child, self.population - self.elites, scores)
            elites = [kept for kept, _ in fittest([*elites, *new], cost, self.elites)]
        work.step(total, total)
        return elites[0], scores[elites[0]], len(scores)

    def transform(self, work: Work) -> Facts:
        """Rank heads and channels, take the dense gradients, search, cut."""
        windows = work.windows[: self.windows]
        if windows.shape[1] < 2:
            raise BadInput(f"{self.slug} needs a next-token loss: use windows of two tokens or more")
        decoder = work.decoder

        def observe(layer: DecoderLayer) -> dict[str, Watch]:
            names = [name for name in ("output", "down") if name in layer.by_input]
            return {name: Watch(layer.by_input[name][0], SquareSum()) for name in names}

        parts = parts_of(decoder, work.observe(observe))
        budget = (1 - self.sparsity) * decoder.prunable_parameters()
        space = Space(parts, budget, self.width, self.depth)
        device = decoder.embed.weight.device if work.device is None else torch.device(work.device)
        with moved(work.model, device):
            traces = Traces(decoder, windows, work.batch, self.adapter_rank, work.generator())
            best, score, compared = self.evolve(space, traces, work)
        masks = masks_of(space, best)
        for block, mask in masks.items():
            layer = decoder.layers[block.index]
            if mask is not None and block.part == "attention":
                keep_heads(layer.attention, mask)
            elif mask is not None:
                keep_channels(layer.mlp, mask)
        gone = sorted(block for block, mask in masks.items() if mask is None)
        remove_blocks(decoder, gone)
        return {
            "blocks removed": ", ".join(map(str, gone)) or "none",
            "architectures compared": compared,
            "gradient correlation, mean over blocks left": round(score / (len(masks) - len(gone)), 6),
        }


def masks_of(space: Space, kept: Architecture) -> Mapping[Block, torch.Tensor | None]:
    """Heads and channels of every block that stay; ``None`` for a block that leaves."""
    return {
        part.block: part.mask(units) if units else None for part, units in zip(space.parts, kept, strict=True)
    }
