"""SpAtten inside one attention layer: local value pruning and progressive quantisation (arXiv 2012.09852).

Both save reads of memory on hardware made for them. Here they are carried out number by number, so that what they do
to a model can be measured; they save no time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class SparseAttention:
    """Attention with few values and few bits.

    Attributes:
        keep_values: fraction of its keys whose values each query reads, those of highest probability; not renormalised.
        bits: high and low bits of queries, keys and values; ``None`` = not quantised.
        tau: the low bits are read where no probability reaches this.
        progressive: single queries begin with the high bits; else all bits are read at once, and several queries (a
            prompt) are not quantised.
        queries: rows of attention that began with the high bits so far.
        refined: those of them that needed the low ones.
    """

    keep_values: float = 1.0
    bits: tuple[int, int] | None = None
    tau: float = 0.1
    progressive: bool = True
    queries: int = 0
    refined: int = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``zoo.engines.cascade.Attend``: outputs ``[B, H, Q, d]`` and float32 probabilities ``[B, H, Q, K]``."""
        probabilities, value = self._probabilities(query, key, value, allowed, scaling)
        read = probabilities
        if self.keep_values < 1:
            read = keep_largest(probabilities, allowed, self.keep_values)
        return read.to(value.dtype) @ value, probabilities

    def _probabilities(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        in_steps = self.progressive and query.shape[2] == 1
        if self.bits is None or (self.progressive and not in_steps):
            return _softmax(query, key, allowed, scaling), value
        high, low = self.bits
        value = quantise(value, high + low)
        exact = _softmax(quantise(query, high + low), quantise(key, high + low), allowed, scaling)
        if not in_steps:
            return exact, value
        read = [quantise(x, high + low, dropped=low) for x in (query, key)]
        coarse = _softmax(read[0], read[1], allowed, scaling)
        flat = coarse.amax(-1, keepdim=True) < self.tau
        self.queries += flat.numel()
        self.refined += int(flat.sum())
        return torch.where(flat, exact, coarse), value


def keep_largest(probabilities: torch.Tensor, allowed: torch.Tensor, keep: float) -> torch.Tensor:
    """Zero all but the ``floor(n * keep)`` largest of each row's ``n`` allowed entries, at least one.

    Args:
        probabilities: ``[B, H, Q, K]``.
        allowed: ``[B, 1, Q, K]`` bool.
        keep: fraction of them.
    """
    count = torch.floor(allowed.sum(-1, keepdim=True) * keep + 1e-6).clamp(min=1)
    rank = probabilities.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return probabilities.masked_fill(rank >= count, 0.0)


def quantise(x: torch.Tensor, bits: int, dropped: int = 0) -> torch.Tensor:
    """Linear symmetric quantisation of vectors ``[..., d]``, each with a scale of its own, and back.

    Args:
        x: vectors.
        bits: of a number, sign included.
        dropped: low bits that are not read (an arithmetic shift).
    """
    largest = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    numbers = (x.float() / scale).round()
    if dropped:
        numbers = (numbers / 2**dropped).floor() * 2**dropped
    return (numbers * scale).to(x.dtype)


def _softmax(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor, scaling: float) -> torch.Tensor:
    scores = (query @ key.mT).float().mul_(scaling)
    # On a CPU a sum is many times faster than filling under a mask.
    hidden = (~allowed).to(scores.dtype) * torch.finfo(scores.dtype).min
    return scores.add_(hidden).softmax(-1)
