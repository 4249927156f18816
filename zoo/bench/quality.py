"""How far a method's answers are from the dense model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

_ROWS = 16
"""Positions whose distributions are compared at once."""


@dataclass(frozen=True)
class LanguageQuality:
    """Next-token figures over ``tokens`` predicted positions.

    Attributes:
        dense_loss, method_loss: mean negative log-likelihood, in nats; perplexity is its exponential.
        agreement: fraction of positions with the same most likely token.
        kl: mean ``KL(dense || method)``, in nats.
        windows: windows evaluated.
    """

    dense_loss: float
    method_loss: float
    agreement: float
    kl: float
    tokens: int
    windows: int

    @property
    def dense_perplexity(self) -> float:
        """``exp(dense_loss)``, infinite when that overflows."""
        return _exp(self.dense_loss)

    @property
    def method_perplexity(self) -> float:
        """``exp(method_loss)``, infinite when that overflows."""
        return _exp(self.method_loss)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def language_quality(
    dense: Any, method: Any, windows: torch.Tensor, progress: Callable[[int], None] | None = None
) -> LanguageQuality:
    """Compare two causal models on the same text, window by window (each predicts its tokens 2..T from those before).

    Args:
        dense, method: transformers models on one device; called as ``model(input_ids=...)``.
        windows: token ids ``[windows, T]``.
        progress: called with the number of windows done.

    Distributions are computed in float32 whatever the models' type.
    """
    dense_loss = method_loss = agreement = divergence = 0.0
    tokens = 0
    device = next(dense.parameters()).device
    for done, window in enumerate(windows, start=1):
        ids = window.unsqueeze(0).to(device)
        logits = [model(input_ids=ids, use_cache=False).logits[0, :-1] for model in (dense, method)]
        # A few positions at a time: distributions over a large vocabulary would fall out of the processor's caches.
        for target, *rows in zip(
            ids[0, 1:].split(_ROWS), *(part.split(_ROWS) for part in logits), strict=True
        ):
            expected, actual = (row.float().log_softmax(-1) for row in rows)
            dense_loss += float(F.nll_loss(expected, target, reduction="sum"))
            method_loss += float(F.nll_loss(actual, target, reduction="sum"))
            agreement += float((expected.argmax(-1) == actual.argmax(-1)).sum())
            divergence += float((expected.exp() * (expected - actual)).sum())
            tokens += len(target)
        if progress is not None:
            progress(done)
    return LanguageQuality(
        dense_loss / tokens,
        method_loss / tokens,
        agreement / tokens,
        divergence / tokens,
        tokens,
        len(windows),
    )


def next_token_divergence(dense: torch.Tensor, method: torch.Tensor) -> tuple[float, float]:
    """Agreement of the most likely token and mean ``KL(dense || method)`` in nats, for logits ``[B, V]``."""
    expected, actual = dense.float().log_softmax(-1), method.float().log_softmax(-1)
    same = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
    return float(same), float(F.kl_div(actual, expected, reduction="batchmean", log_target=True))


def cosine(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Cosine similarity of the rows of ``a [B, D]`` and ``b [B, D]``, in float32."""
    return [float(value) for value in F.cosine_similarity(a.float(), b.float(), dim=-1)]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the common beginning of two lists of token ids."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))
