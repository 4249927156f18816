"""Information Horizon: When Token Pruning is Worse than Random (arXiv 2512.07580, CVPR 2026).

The information of a visual token at layer i is what it alone adds to the probability of the true answer when all
other visual tokens leave there. It becomes uniform and vanishes at some depth, the horizon: from there on a random
choice is as good as any. The method prunes at random in one deep layer, and is meant to be stacked on a pruner of the
first layers, as in ``divprune+information-horizon``. ``token_information`` measures the horizon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from pydantic import Field

from zoo.engines.branching import Branches
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
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


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Information:
    """What each visual token tells at each layer.

    Attributes:
        layers: decoder layers in front of which all other visual tokens left.
        alone: probability of the answer when only the token's window stays, ``[layers, N]`` float64.
        without: probability of the answer when no visual token stays, ``[layers]`` float64.
    """

    layers: tuple[int, ...]
    alone: torch.Tensor
    without: torch.Tensor

    @property
    def gain(self) -> torch.Tensor:
        """The information ``I``: what the window adds, ``[layers, N]``."""
        return self.alone - self.without.unsqueeze(1)

    def horizon(self, threshold: float = 1e-3) -> int | None:
        """First layer whose mean ``|I|`` is below ``threshold``; ``None`` = it stays above."""
        small = self.gain.abs().mean(1) < threshold
        return self.layers[int(small.nonzero()[0])] if bool(small.any()) else None


def token_information(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    answer: int,
    *,
    layers: Sequence[int] | None = None,
    window: int = 2,
    batch: int = 16,
) -> Information:
    """Measure the information of the visual tokens of one sample (section 3 of the paper).

    The prompt runs once; each window and layer then continues from what entered that layer, with the window and the
    text alone, at their own positions.

    Args:
        loaded: a vision-language model, without hooks of other methods.
        inputs: of one sample, as its processor makes them.
        answer: id of the first token of the true answer.
        layers: which to measure; ``None`` = all but layer 0.
        window: tokens that stay together form squares of this side; 1 = every token by itself.
        batch: windows that run at once.

    Raises:
        BadInput: a window of more than one token on a picture that is not one grid (tiles, newlines, video).
    """
    branches = Branches(loaded, inputs, InformationHorizon.slug)
    chosen = tuple(range(1, branches.depth) if layers is None else layers)
    groups = _groups(branches, window)
    alone, without = [], []
    for layer in chosen:
        kept = branches.text.unsqueeze(0)
        without.append(answer_probability(branches.logits_from(layer, kept), answer))
        found = torch.zeros(len(branches.visual), dtype=torch.float64, device=kept.device)
        for size in sorted({len(group) for group in groups}):
            for part in torch.stack([group for group in groups if len(group) == size]).split(batch):
                some = torch.cat((branches.visual[part], kept.expand(len(part), -1)), dim=1).sort(1).values
                values = answer_probability(branches.logits_from(layer, some), answer)
                found[part] = values.unsqueeze(1)
        alone.append(found)
    return Information(chosen, torch.stack(alone), torch.cat(without))


def windows(rows: int, columns: int, size: int) -> list[torch.Tensor]:
    """Tokens of each square window of a grid, column of windows by column; smaller at the right and lower edge."""
    grid = torch.arange(rows * columns).view(rows, columns)
    return [
        grid[y : y + size, x : x + size].flatten()
        for x in range(0, columns, size)
        for y in range(0, rows, size)
    ]


def answer_probability(logits: torch.Tensor, answer: int) -> torch.Tensor:
    """Softmax probability of one token under ``logits [..., V]``, ``[...]`` float64."""
    return logits.double().softmax(-1)[..., answer]


def most_informative(alone: torch.Tensor, number: int) -> torch.Tensor:
    """The oracle's choice: the ``number`` tokens of largest ``alone [N]``, ties by place, in sequence order."""
    return alone.argsort(descending=True, stable=True)[:number].sort().values


def _groups(branches: Branches, window: int) -> list[torch.Tensor]:
    """Windows as indices into ``branches.visual``."""
    if window == 1:
        return list(torch.arange(len(branches.visual), device=branches.visual.device).split(1))
    groups, start = [], 0
    for packed, _, _, places in branches.pictures:
        grid = packed.parts[0].grid
        if len(packed.parts) != 1 or len(grid) != 2 or grid[0] * grid[1] != len(places):
            raise BadInput(
                "information-horizon: windows need a picture that is one grid, without tiles or newlines; use window=1"
            )
        groups += [start + group.to(places.device) for group in windows(grid[0], grid[1], window)]
        start += len(places)
    return groups
