"""The heads of Medusa (2401.10774), their loss and how often they are right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zoo.engines.draft_heads import DraftHeads, Output, output_layer, target_sizes
from zoo.engines.language_modelling import IGNORED
from zoo.engines.training import Loss
from zoo.models import LoadedModel

RANKS = 10
"""Guesses of a head that a tree may use."""


class MedusaHeads(DraftHeads):
    """Head ``k`` (from 0) reads the final hidden state at a place and predicts the token ``k + 2`` places behind it.

    ``logits_k = output_k(h + silu(W_k h + b_k))``, the inner part repeated with the same weights where there is more
    than one layer. ``W`` starts at zero and ``output`` as a copy of the target's, so at first every head predicts what
    the target itself predicts for the next place.

    Args:
        sizes: ``hidden``, ``vocabulary``, ``heads``, ``layers`` and ``own_output``; without the last, all heads use
            the target's output layer, and only ``W`` and ``b`` are learnt.
    """

    method = "medusa"

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__(sizes)
        hidden, vocabulary = sizes["hidden"], sizes["vocabulary"]
        self.blocks = nn.ModuleList(_zero(nn.Linear(hidden, hidden)) for _ in range(sizes["heads"]))
        own = sizes["heads"] if sizes["own_output"] else 0
        self.outputs = nn.ModuleList(nn.Linear(hidden, vocabulary, bias=False) for _ in range(own))

    @classmethod
    def fresh(cls, loaded: LoadedModel, heads: int, layers: int = 1, own_output: bool = True) -> MedusaHeads:
        """Untrained heads (float32) for a model."""
        sizes = {**target_sizes(loaded), "heads": heads, "layers": layers, "own_output": own_output}
        result = cls(sizes)
        with torch.no_grad():
            for weight in result.outputs.parameters():
                weight.copy_(output_layer(loaded.model).weight)
        return result.to(loaded.device)

    def __len__(self) -> int:
        return len(self.blocks)

    def logits(self, head: int, hidden: torch.Tensor, output: Output) -> torch.Tensor:
        """Logits ``[..., vocabulary]`` of one head from ``hidden [..., hidden]``.

        ``output`` is the target's output layer, for heads without their own.
        """
        hidden = hidden.to(next(self.parameters()).dtype)
        for _ in range(self.sizes["layers"]):
            hidden = hidden + functional.silu(self.blocks[head](hidden))
        own: Output = self.outputs[head] if self.outputs else output
        return own(hidden)

    def guesses(self, hidden: torch.Tensor, output: Output, width: int) -> torch.Tensor:
        """The ``width`` likeliest tokens of every head, ``[..., heads, width]``."""
        each = [ranked(self.logits(head, hidden, output), width) for head in range(len(self))]
        return torch.stack(each, dim=-2)


def _zero(layer: nn.Linear) -> nn.Linear:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def ranked(logits: torch.Tensor, width: int) -> torch.Tensor:
    """The ``width`` likeliest tokens, best first: ``[..., width]`` from ``[..., vocabulary]``."""
    return logits.topk(min(width, logits.shape[-1]), dim=-1).indices


def _lessons(heads: int, labels: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """For each head the places that it learns from (bool ``[batch, tokens]``) and the tokens to predict there."""
    for head in range(heads):
        ahead = functional.pad(labels[:, head + 2 :], (0, min(head + 2, labels.shape[1])), value=IGNORED)
        places = ahead != IGNORED
        yield places, ahead[places]


def heads_loss(
    heads: MedusaHeads, hidden: torch.Tensor, labels: torch.Tensor, output: Output, decay: float
) -> Loss:
    """Cross entropy of all heads, head ``k`` (from 0) weighted with ``decay ** (k + 1)``.

    Args:
        heads: to be trained.
        hidden: final hidden states ``[batch, tokens, hidden]``, float32.
        labels: ``[batch, tokens]``, ``IGNORED`` where nothing is predicted.
        output: the target's output layer.
        decay: 0.8 in the paper, 1 in the release.
    """
    parts: dict[str, torch.Tensor] = {}
    total = hidden.new_zeros(())
    terms = 0
    for head, (places, tokens) in enumerate(_lessons(len(heads), labels)):
        logits = heads.logits(head, hidden[places], output).float()
        loss = functional.cross_entropy(logits, tokens, reduction="sum")
        parts[f"head {head + 1}"] = loss
        total = total + decay ** (head + 1) * loss
        terms = max(terms, len(tokens))
    return Loss(total, terms, parts)


@torch.no_grad()
def accuracies(
    heads: MedusaHeads, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], output: Output
) -> list[list[float]]:
    """How often each head's guess of each rank is the token to predict: ``[heads][ranks]``.

    Args:
        heads: at rest.
        batches: hidden states and labels, as for ``heads_loss``.
        output: the target's output layer.
    """
    width = min(RANKS, heads.sizes["vocabulary"])
    right = torch.zeros(len(heads), width, dtype=torch.float64)
    counts = [0] * len(heads)
    for hidden, labels in batches:
        for head, (places, tokens) in enumerate(_lessons(len(heads), labels)):
            guesses = ranked(heads.logits(head, hidden[places], output), width)
            right[head] += (guesses == tokens.unsqueeze(1)).sum(0).cpu()
            counts[head] += len(tokens)
    return [(row / max(1, count)).tolist() for row, count in zip(right, counts, strict=True)]
