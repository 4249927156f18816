"""The search for VFlowOpt's knobs: keep the state from which the model answers where the whole picture puts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from zoo.engines.bayesian import Search
from zoo.errors import BadInput
from zoo.models import LoadedModel

if TYPE_CHECKING:
    from zoo.methods.visual_tokens.vflowopt import VFlowOpt


def bounds(keep_ratio: float, lengths: tuple[int, int, int]) -> tuple[tuple[float, float], ...]:
    """Ranges of first share, second share, threshold, cell and entropy weight.

    The release states them for a quarter of the tokens (0.25 to 0.375 for the first share); other budgets scale it.

    Args:
        keep_ratio: mean share of visual tokens.
        lengths: decoder layers behind each cut; those behind the third must be left something.
    """
    most = min(1.5, 0.97 * sum(lengths) / (lengths[0] + lengths[1]))
    first = (keep_ratio, max(keep_ratio, min(1.0, most * keep_ratio)))
    return first, (0.533, 1.0), (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0)


@torch.no_grad()
def final_state(loaded: LoadedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Hidden state of the last prompt token behind the last layer and its norm, ``[B, D]`` float32."""
    vlm = loaded.anatomy.vlm
    assert vlm is not None
    state: torch.Tensor = vlm(**{**inputs, "use_cache": False}).last_hidden_state[:, -1]
    return state.float()


def agreement(full: torch.Tensor, pruned: torch.Tensor) -> float:
    """Cosine between two final states ``[1, D]``; 0 when it is not a number."""
    return float(F.cosine_similarity(full, pruned).nan_to_num().mean())


def search(
    cls: type[VFlowOpt],
    loaded: LoadedModel,
    samples: Iterable[Mapping[str, Any]],
    keep_ratio: float,
    *,
    calls: int,
    initial: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
    parameters: Mapping[str, Any],
) -> VFlowOpt:
    """See ``VFlowOpt.fit``."""
    samples = list(samples)
    if not samples or calls < 1 or not 0 < keep_ratio < 1:
        raise BadInput(
            f"vflowopt: the search needs samples, calls and a keep_ratio between 0 and 1; {len(samples)} samples, "
            f"calls={calls} and keep_ratio={keep_ratio:g} were given"
        )
    fixed = {**normalisation(loaded), **parameters}

    def method(knobs: tuple[float, ...]) -> VFlowOpt:
        first, second, threshold, cell, entropy = knobs
        return cls(
            **{
                "keep_ratio": keep_ratio,
                "first_share": first,
                "second_share": second,
                "threshold": threshold,
                "cell": cell,
                "entropy_weight": entropy,
                **fixed,
            }
        )

    full = [final_state(loaded, inputs) for inputs in samples]
    lengths = cls(keep_ratio=keep_ratio, **fixed).lengths(loaded.anatomy)
    knobs = Search(bounds(keep_ratio, lengths), initial, seed)
    for call in range(calls):
        if progress is not None:
            progress(call, calls)
        with method(knobs.ask()).apply(loaded):
            found = [agreement(h, final_state(loaded, x)) for h, x in zip(full, samples, strict=True)]
        knobs.tell(-sum(found))
    return method(knobs.best)


def normalisation(loaded: LoadedModel) -> dict[str, Any]:
    """Mean and deviation that the model's image processor uses, as fields of the method."""
    processor = getattr(loaded.processor, "image_processor", None)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return {"pixel_mean": tuple(mean), "pixel_std": tuple(std)} if mean and std else {}
