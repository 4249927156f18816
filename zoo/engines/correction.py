"""Showing a method other attention than the decoder pays: for corrections that any method can be stacked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from zoo.engines.reductions import Keep
from zoo.engines.tokens import TokenReducer
from zoo.engines.views import Stage, View
from zoo.errors import BadInput
from zoo.models import LoadedModel


@dataclass(frozen=True)
class _CorrectedView(View):
    """A view whose attention goes through ``correct [H, ..., L] -> [H, ..., L]`` before anybody reads it."""

    correct: Callable[[torch.Tensor], torch.Tensor] = torch.clone

    def attention(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return self.correct(super().attention(layer, rows))

    def received(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return self.correct(super().received(layer, rows))


def corrected(view: View, correct: Callable[[torch.Tensor], torch.Tensor]) -> View:
    """``view`` with attention that goes through ``correct``."""
    known = {field.name: getattr(view, field.name) for field in fields(View)}
    return _CorrectedView(**known, correct=correct)


def attention_read(
    name: str, loaded: LoadedModel, stages: Sequence[Stage], samples: Iterable[Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention to visual tokens that the first of ``stages`` reads over some samples; no token leaves.

    Args:
        name: of the method that asks, for error messages.
        loaded: a vision-language model, without hooks of other methods.
        stages: of a method; the first one's rows are noted, as means over heads and queries.
        samples: inputs as the processor makes them.

    Returns:
        Place of each token in its sample (0 = first, below 1) and attention to it, both ``[M]`` float64.

    Raises:
        BadInput: no stage, no sample, or the stage reads no attention.
    """
    places: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []

    def note(stage: Stage, view: View) -> Keep:
        def listen(attention: torch.Tensor) -> torch.Tensor:
            places.append(view.ordinal.double() / view.total)
            scores.append(attention[..., view.index].flatten(0, -2).double().mean(0))
            return attention

        stage.reduce(corrected(view, listen))
        return Keep(torch.arange(len(view.index), device=view.index.device).unsqueeze(0))

    listening = [replace(stage, reduce=partial(note, stage)) for stage in stages[:1]]
    for sample in samples:
        reducer = TokenReducer(loaded.anatomy, listening, "keep", name)
        try:
            with torch.no_grad():
                loaded.model(**sample, use_cache=False)
        finally:
            reducer.close()
    if not scores:
        raise BadInput(
            f"{name}: fitting needs at least one sample, and a host that reads attention and drops tokens"
        )
    return torch.cat(places), torch.cat(scores)


def fit_trend(place: torch.Tensor, score: torch.Tensor) -> float:
    """``sigma`` of the least-squares fit of ``mu * exp(sigma * place)`` to ``score``, both ``[M]`` float64.

    For a given ``sigma`` the best ``mu`` has a closed form; what is left is one-dimensional: a grid over [-8, 8] that
    is refined around its best point.
    """
    middle, reach = 0.0, 8.0
    while reach > 1e-6:
        sigma = torch.linspace(middle - reach, middle + reach, 65, dtype=torch.float64, device=place.device)
        shape = (sigma.unsqueeze(1) * place).exp()
        mu = (shape @ score) / shape.square().sum(1)
        error = (mu.unsqueeze(1) * shape - score).square().sum(1)
        middle, reach = float(sigma[error.argmin()]), reach / 16
    return middle
