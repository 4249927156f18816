"""What each visual token tells about the answer, layer by layer (Information Horizon, arXiv 2512.07580, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zoo.engines.branching import Branches
from zoo.errors import BadInput
from zoo.models import LoadedModel

_NAME = "information-horizon"


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
    answer: int | None = None,
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
        answer: id of the first token of the true answer; ``None`` = what the whole prompt makes most probable.
        layers: which to measure; ``None`` = all but layer 0.
        window: tokens that stay together form squares of this side; 1 = every token by itself.
        batch: windows that run at once.

    Raises:
        BadInput: a window of more than one token on a picture that is not one grid (tiles, newlines, video).
    """
    branches = Branches(loaded, inputs, _NAME)
    if answer is None:
        answer = int(branches.logits.argmax())
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


def common_horizon(found: Sequence[Information], threshold: float) -> int:
    """First layer whose ``|I|``, mean over the tokens of a sample and then over samples, is below ``threshold``.

    Raises:
        BadInput: there is none, or no sample.
    """
    if not found:
        raise BadInput(f"{_NAME}: measuring the horizon needs at least one sample")
    told = torch.stack([one.gain.abs().mean(1) for one in found]).mean(0)
    behind = (told < threshold).nonzero()
    if not len(behind):
        raise BadInput(
            f"{_NAME}: the visual tokens tell {float(told.min()):.2g} or more in every layer, and the threshold is "
            f"{threshold:g}: raise it"
        )
    return found[0].layers[int(behind[0])]


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
                f"{_NAME}: windows need a picture that is one grid, without tiles or newlines; use window=1"
            )
        groups += [start + group.to(places.device) for group in windows(grid[0], grid[1], window)]
        start += len(places)
    return groups
