"""Attention that visual tokens receive, and how many of them each decoder layer may lose before it shrinks too much.

The attention mass of a layer is what its strongest heads pay to the visual tokens. A tolerance says by how much that
mass may fall below the unpruned model's; it decides how many tokens each layer deletes, and so the FLOPs. The search
finds the smallest tolerance that meets a FLOPs target. Everything runs through the token engine: a trial is a forward
pass with one stage behind every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zoo.engines.reductions import Keep
from zoo.engines.selection import rows_of_question
from zoo.engines.tokens import Select, Stage, TokenReducer, View
from zoo.errors import BadInput
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder


def strongest_received(view: View, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the strongest head of each query of ``layer`` pays to the visual tokens, in float32.

    Rows are computed a few at a time, so that no full map exists.

    Returns:
        Sum over the rows of text behind them ``[N]``, and mean over their own rows ``[N]``.
    """
    few = max(1, min(64, len(view.index) // 4))
    cross, mutual = (
        sum_of_strongest(view.attention(layer, part) for part in rows.split(few))[view.index]
        for rows in (rows_of_question(view.text_index, view.index), view.index)
    )
    return cross, mutual / len(view.index)


def sum_of_strongest(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Maximum over heads, then sum over queries, of attention rows given in parts ``[H, R, N]``: ``[N]``."""
    return torch.stack([part.amax(0).sum(0) for part in parts]).sum(0)


def sum_and_peak(view: View, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and maximum, over the rows of text behind them, of what ``layer`` pays to the visual tokens.

    Heads are averaged first. Rows are computed a few at a time, so that no full map exists.

    Returns:
        Both ``[N]``, in float32.
    """
    few = max(1, min(64, len(view.index) // 4))
    total = peak = torch.zeros(len(view.index), device=view.index.device)
    for rows in rows_of_question(view.text_index, view.index).split(few):
        attention = view.attention(layer, rows).mean(0)[:, view.index]
        total, peak = total + attention.sum(0), torch.maximum(peak, attention.amax(0))
    return total, peak


def removable(received: torch.Tensor, floor: float | torch.Tensor) -> torch.Tensor:
    """The least attended tokens, ascending, as many as can go while the others receive at least ``floor``, ``[K]``.

    One token stays in any case.

    Args:
        received: attention that each token receives, ``[N]``.
        floor: attention that must be left.
    """
    values, order = received.sort(stable=True)
    left = received.sum() - values.cumsum(0)
    return order[: min(int((left >= floor).sum()), len(order) - 1)]


def removable_by_both(
    cross: torch.Tensor, mutual: torch.Tensor, floors: tuple[float | torch.Tensor, float | torch.Tensor]
) -> torch.Tensor:
    """Tokens that both kinds of attention can spare, ascending ``[K]``; see ``removable``."""
    spared = torch.zeros(2, len(cross), dtype=torch.bool, device=cross.device)
    spared[0, removable(cross, floors[0])] = True
    spared[1, removable(mutual, floors[1])] = True
    return spared.all(0).nonzero().squeeze(-1)


def layer_flops(tokens: float, hidden: int, width: int) -> float:
    """FLOPs (multiply-adds) of ``tokens`` visual tokens in one layer: projections, attention, gated MLP."""
    return 4 * tokens * hidden**2 + 2 * tokens**2 * hidden + 3 * tokens * hidden * width


@dataclass(frozen=True)
class Recipe:
    """How many visual tokens each decoder layer deletes, for inputs of ``tokens`` visual tokens."""

    counts: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class _Sample:
    inputs: Mapping[str, Any]
    tokens: int
    mass: list[tuple[float, float]]
    """What text and visual tokens pay in each layer but the last, per row, when nothing is deleted."""


def fit_recipe(
    name: str,
    loaded: LoadedModel,
    samples: Iterable[Mapping[str, Any]],
    keep_ratio: float,
    tolerance: float,
) -> Recipe:
    """The recipe of the smallest loss of attention mass that meets a FLOPs target.

    Args:
        name: of the method, for error messages.
        loaded: a vision-language model, without hooks of other methods.
        samples: inputs of one sample each, as the processor makes them.
        keep_ratio: share of the visual tokens' FLOPs in the decoder that shall stay.
        tolerance: width of the interval at which the bisection stops.

    Raises:
        BadInput: no sample, one with several rows, or a target outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise BadInput(f"{name}: keep_ratio must lie in (0, 1]; {keep_ratio} was given")
    if not 0 < tolerance < 1:
        raise BadInput(f"{name}: tolerance must lie in (0, 1); {tolerance} was given")
    decoder = loaded.anatomy.decoder
    known = [_look(name, loaded, inputs) for inputs in samples]
    if not known or decoder is None:
        raise BadInput(f"{name}: fitting needs at least one sample")

    def trial(alpha: float) -> tuple[bool, list[float]]:
        deleted = [_delete(name, loaded, sample, alpha) for sample in known]
        return _within_budget(decoder, known, deleted, keep_ratio)

    low, high = 0.0, 1.0
    best = None
    while high - low > tolerance:
        middle = (low + high) / 2
        reached, mean = trial(middle)
        if reached:
            high, best = middle, mean
        else:
            low = middle
    tokens = round(sum(sample.tokens for sample in known) / len(known))
    shares = trial(high)[1] if best is None else best
    # A whole number of tokens per layer: rounded down, so the cut is never deeper than fitted.
    return Recipe(tuple(int(share * tokens + 1e-6) for share in shares), tokens)


def _look(name: str, loaded: LoadedModel, inputs: Mapping[str, Any]) -> _Sample:
    """Run one sample unpruned."""
    if len(inputs["input_ids"]) != 1:
        raise BadInput(
            f"{name} is fitted on one sample at a time; {len(inputs['input_ids'])} rows were given "
            "(call the processor once per sample)"
        )
    totals, mass = [], []

    def note(layer: int, view: View) -> Keep:
        cross, mutual = strongest_received(view, layer)
        totals.append(view.total)
        text = len(rows_of_question(view.text_index, view.index))
        mass.append((float(cross.sum() / text), float(mutual.sum())))
        return Keep(torch.arange(len(view.index), device=view.index.device).unsqueeze(0))

    _run(name, loaded, inputs, note)
    return _Sample(inputs, totals[0], mass)


def _delete(name: str, loaded: LoadedModel, sample: _Sample, alpha: float) -> list[int]:
    """Tokens that each layer but the last deletes when the mass may shrink by the fraction ``alpha``."""
    deleted = []

    def delete(layer: int, view: View) -> Keep:
        cross, mutual = strongest_received(view, layer)
        cross = cross / len(rows_of_question(view.text_index, view.index))
        floors = tuple(mass * (1 - alpha) for mass in sample.mass[layer])
        gone = removable_by_both(cross, mutual, (floors[0], floors[1]))
        deleted.append(len(gone))
        stays = torch.ones(len(cross), dtype=torch.bool, device=cross.device)
        stays[gone] = False
        return Keep(stays.nonzero().T)

    _run(name, loaded, sample.inputs, delete)
    return deleted


def _run(name: str, loaded: LoadedModel, inputs: Mapping[str, Any], rule: Any) -> None:
    """One forward pass with ``rule(layer, view)`` behind every layer but the last."""
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    stages = []
    for layer in range(len(decoder.layers) - 1):
        reduce: Select = partial(rule, layer)
        stages.append(Stage(layer + 1, reduce, observes=(layer,)))
    reducer = TokenReducer(loaded.anatomy, stages, "keep", name)
    try:
        with torch.no_grad():
            loaded.model(**inputs, use_cache=False)
    finally:
        reducer.close()


def _within_budget(
    decoder: Decoder, samples: Sequence[_Sample], deleted: Sequence[Sequence[int]], keep_ratio: float
) -> tuple[bool, list[float]]:
    """Whether the target is met, and the mean share of the tokens that each layer deletes until it is.

    In front of each layer the FLOPs of the layers that have run are added to a forecast for the others with the tokens
    that are left; once that is within the target, later layers delete nothing.
    """
    depth, hidden, width = len(decoder.layers), decoder.hidden_size, decoder.layers[0].mlp.width

    def flops(tokens: float) -> float:
        return layer_flops(tokens, hidden, width)

    left = [float(sample.tokens) for sample in samples]
    target = keep_ratio * depth * sum(map(flops, left))
    shares, spent = [0.0] * depth, 0.0
    for layer in range(depth):
        now = sum(map(flops, left))
        if spent + (depth - layer) * now <= target:
            return True, shares
        spent += now
        if layer < depth - 1:
            gone = [counts[layer] for counts in deleted]
            shares[layer] = sum(n / s.tokens for n, s in zip(gone, samples, strict=True)) / len(samples)
            left = [tokens - n for tokens, n in zip(left, gone, strict=True)]
    return False, shares
