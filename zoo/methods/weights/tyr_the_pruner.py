"""Týr-the-Pruner: prune every matrix to several sparsities, then search which of them belong together.

Li et al.: Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization, NeurIPS 2025 (arXiv
2503.09657). A local pruner removes heads and FFN channels by second-order scores and re-solves what is left, at levels
around an expected sparsity; later layers are pruned on what the layers before them, at their expected sparsity, put
out. An evolutionary search moves single steps between matrices of one kind, so the budget never changes, towards the
smallest KL divergence from the dense model. The next round begins at what was found, with steps half as large.

The released search, 50 generations of 128 candidates in each of 4 rounds, takes hours on a GPU; the defaults are
smaller. Steps follow the size of the matrices: an eighth in the first round, as for the 7B models of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator

from zoo.engines.evolution import Dice, distinct, fittest
from zoo.engines.stepping import evaluating, moved
from zoo.errors import BadInput
from zoo.families.weights import Facts, WeightMethod, Work
from zoo.interface import refuse, register
from zoo.methods.weights._tyr_divergence import DenseOutputs
from zoo.methods.weights._tyr_supernet import Levels, Supernet
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder

MOST_FLIPS = 4
"""Steps that a new candidate moves from one matrix to another, at most."""


@register("tyr-the-pruner")
class TyrThePruner(WeightMethod):
    """Supernet of locally pruned matrices, evolutionary search, coarse to fine."""

    sparsity: float = Field(0.2, ge=0, lt=1, description="Fraction of decoder-layer weights to remove.")
    heads: Literal["groups", "single"] = Field(
        "groups",
        description="What leaves where query heads share keys and values: whole groups, so that all that is pruned is "
        "also smaller; or single query heads, as released, some of which stay in the shapes as zeros.",
    )
    levels: int = Field(9, ge=3, description="Sparsities per matrix, the expected one in the middle.")
    rounds: int = Field(2, ge=1, description="Times that the matrices are pruned and searched. Released: 4.")
    generations: int = Field(8, ge=0, description="Of each search. Released: 50.")
    offspring: int = Field(16, ge=1, description="New candidates per generation. Released: 128.")
    tokens: tuple[int, int, int] = Field(
        (512, 2048, 4096),
        description="Tokens that candidates are compared on in the three stages of a generation. Released: 2048, "
        "16384, 131072.",
    )
    survivors: tuple[int, int] = Field(
        (4, 2), description="Candidates that reach the second and the third stage. Released: 16, 4."
    )
    top: int = Field(
        1024, ge=1, description="Highest logits of the dense model that are compared. Released: 8192."
    )
    updates: int = Field(16, ge=1, description="Passes in which the channels of a matrix leave.")

    @model_validator(mode="after")
    def _stages_are_counts(self) -> TyrThePruner:
        if min(*self.tokens, *self.survivors) < 1:
            raise ValueError("tokens and survivors are counts of 1 and more")
        return self

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return self.sparsity == 0

    def check(self, loaded: LoadedModel) -> None:
        """As all weight methods; and candidates are compared by their predictions.

        Raises:
            Refused: the model has no LM head.
        """
        super().check(loaded)
        assert loaded.anatomy.decoder is not None
        if loaded.anatomy.decoder.head is None:
            raise refuse(self, "an LM head", "none")

    def mutated(self, parent: Levels, supernet: Supernet, dice: Dice) -> Levels | None:
        """A neighbour of ``parent`` of the same size: a few times, one matrix gains a step and one like it loses one.

        ``None`` when the draw leads to a level that does not exist.
        """
        levels, slots = list(parent), supernet.slots
        for _ in range(min(dice.integer(1, MOST_FLIPS), dice.integer(1, MOST_FLIPS))):
            denser = [i for i, slot in enumerate(slots) if levels[i] - 1 in slot.variants]
            if not denser:
                return None
            gains = dice.choice(denser)
            sparser = [
                i
                for i, slot in enumerate(slots)
                if i != gains and slot.kind == slots[gains].kind and levels[i] + 1 in slot.variants
            ]
            if not sparser:
                return None
            levels[gains] -= 1
            levels[dice.choice(sparser)] += 1
        return tuple(levels)

    def generation(self, parent: Levels, supernet: Supernet, dense: DenseOutputs, dice: Dice) -> Levels:
        """The next parent: new candidates are compared on ever more text, with their parent in the end."""
        rivals = distinct(partial(self.mutated, parent, supernet, dice), self.offspring, (parent,))
        if not rivals:
            return parent

        def divergence(sample: torch.Tensor, tokens: int, levels: Levels) -> float:
            supernet.install(levels)
            return dense.divergence(supernet.decoder, sample, tokens)

        first, second, third = (partial(divergence, dense.sample(n, dice), n) for n in self.tokens)
        for compared, count in zip((first, second), self.survivors, strict=True):
            rivals = [levels for levels, _ in fittest(rivals, compared, count)]
        ((best, _),) = fittest([parent, *rivals], third, 1)
        return best

    @torch.no_grad()
    def transform(self, work: Work) -> Facts:
        """Prune and search, round by round; then cut."""
        windows = work.windows
        if windows.shape[1] < 2:
            raise BadInput(f"{self.slug} compares next-token predictions: use windows of two tokens or more")
        decoder, dice = work.decoder, Dice(work.generator())
        device = decoder.embed.weight.device if work.device is None else torch.device(work.device)
        with _running(decoder, device):
            dense = DenseOutputs(decoder, windows, self.top, work.batch)
        supernet = Supernet(decoder, self.sparsity, self.heads == "groups")
        layers = len(decoder.layers)
        steps = layers + self.generations

        def progress(number: int, done: int, _: int = 0) -> None:
            work.step(number * steps + done, self.rounds * steps)

        for number in range(self.rounds):
            supernet.build(
                windows,
                number,
                levels=self.levels,
                updates=self.updates,
                batch=work.batch,
                device=work.device,
                progress=partial(progress, number),
            )
            parent: Levels = (0,) * len(supernet.slots)
            with _running(decoder, device):
                for generation in range(self.generations):
                    parent = self.generation(parent, supernet, dense, dice)
                    progress(number, layers + generation + 1)
                supernet.settle(parent, number)
        with _running(decoder, device):
            everything = torch.arange(len(windows))
            divergence = dense.divergence(decoder, everything, windows.numel())
        supernet.cut()
        return {
            "KL to the dense model on calibration text": round(divergence, 6),
            "head groups removed": sum(slot.removed for slot in supernet.of_kind("output")),
            "FFN channels removed": sum(slot.removed for slot in supernet.of_kind("down")),
        }


@contextmanager
def _running(decoder: Decoder, device: torch.device) -> Iterator[None]:
    """The whole decoder on ``device``, in evaluation mode."""
    assert decoder.head is not None
    with ExitStack() as undo:
        undo.enter_context(evaluating(decoder.module))
        for module in (decoder.module, decoder.head):
            undo.enter_context(moved(module, device))
        yield
