"""Angular distance between hidden states of the last token: how far a run of layers turns it."""

from __future__ import annotations

import torch
from torch.nn import functional


class LastToken:
    """The last token of every sequence, ``[hidden]`` float32 each, as it enters and as it leaves a layer."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def update(self, *activations: torch.Tensor) -> None:
        """Add one sequence: input and output of the layer, ``[tokens, hidden]`` each."""
        before, after = activations
        self.before.append(
            before[-1].clone()
        )  # what is shown lives in a buffer that the next layer overwrites
        self.after.append(after[-1].clone())


def angular_distances(hidden: torch.Tensor, run: int) -> torch.Tensor:
    """``sum over sequences of arccos(cos(h_i, h_i+run)) / pi`` for each start ``i``.

    Args:
        hidden: the last token before each layer and after the last one, ``[layers + 1, sequences, hidden]``.
        run: layers in a run.

    Returns:
        ``[layers + 1 - run]``.
    """
    cosine = functional.cosine_similarity(hidden[: len(hidden) - run], hidden[run:], dim=-1)
    # Rounding may push a cosine past 1, whose arccos is NaN.
    return (cosine.clamp(-1, 1).arccos() / torch.pi).sum(-1)
