"""Learning signals for embeddings of text: triplets cut from running text, embeddings of them, the contrastive loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from zoo.models.anatomy import Anatomy

SCALE = 20.0
"""Cosines are multiplied by this before the softmax."""


@dataclass(frozen=True)
class Triplets:
    """Token ids ``[triplets, tokens]``: texts, others that belong to them, and others that do not."""

    query: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor

    def __len__(self) -> int:
        return len(self.query)

    def batches(self, size: int) -> Iterator[Triplets]:
        """Consecutive triplets, ``size`` at a time."""
        parts = (part.split(size) for part in (self.query, self.positive, self.negative))
        return (Triplets(*three) for three in zip(*parts, strict=True))


def triplets_of(windows: torch.Tensor, tokenizer: Any = None) -> Triplets:
    """Triplets without labels: the two halves of a window belong together, the second half of the next does not.

    Args:
        windows: token ids ``[windows, tokens]``, at least two windows of two tokens.
        tokenizer: marks beginning and end of every text as its model expects, if it does ([CLS] and [SEP] of BERT).
    """
    half = windows.shape[1] // 2
    first, second = windows[:, :half], windows[:, half : 2 * half]
    begin, end = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    if begin is not None and end is not None:
        edge = windows.new_ones(len(windows), 1)
        first, second = (torch.cat([edge * begin, part, edge * end], 1) for part in (first, second))
    return Triplets(first, second, second.roll(-1, 0))


def embed(anatomy: Anatomy, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[texts, hidden]`` of ``ids [texts, tokens]`` without padding.

    The hidden state of the last token for decoders, the mean over all tokens for bidirectional encoders.
    """
    if anatomy.text_encoder is not None:
        module: Any = anatomy.text_encoder.module
        mean: torch.Tensor = module(input_ids=ids.to(module.device)).last_hidden_state.mean(1)
        return mean
    assert anatomy.decoder is not None
    decoder: Any = anatomy.decoder.module
    last: torch.Tensor = decoder(input_ids=ids.to(decoder.device), use_cache=False).last_hidden_state[:, -1]
    return last


def contrastive_loss(anatomy: Anatomy, triplets: Triplets) -> torch.Tensor:
    """Mean cross entropy of finding each positive among all positives and negatives of the batch, 0-d.

    Logits are cosines times ``SCALE``.
    """
    count = len(triplets)
    # One pass over all texts, which are equally long.
    found = embed(anatomy, torch.cat([triplets.query, triplets.positive, triplets.negative])).float()
    unit = functional.normalize(found, dim=1)
    cosines = unit[:count] @ unit[count:].T
    return functional.cross_entropy(SCALE * cosines, torch.arange(count, device=cosines.device))
