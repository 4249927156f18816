"""Looking into attention without a full attention map.

A tap sits where transformers dispatches to an attention kernel: it sees queries and keys after normalisation and
rotary embedding, whatever the architecture, and the kernel (SDPA, flash) runs as before. From them a method asks for
just the rows it needs: ``softmax(q_row K^T)`` is O(N) per head. How a tap gets there, and leaves no trace, is in
``zoo.engines.kernels``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.engines.kernels import put_in_front, run_kernel
from zoo.errors import Refused

_PREFIX = "zoo_observed_"
_ROWS = 64
"""Rows of attention that are computed at once when many are summed."""


@dataclass(frozen=True)
class Seen:
    """Inputs of one attention call.

    Attributes:
        query: ``[B, H, Nq, d]``, after normalisation and rotary embedding.
        key: ``[B, H_kv, Nk, d]``, cached keys included.
        value: ``[B, H_kv, Nk, d]``.
        mask: what the kernel got: ``None``, ``[B, 1, Nq, Nk]`` (bool or additive) or ``[B, Nk]``.
        scaling: factor on the products.
        causal: the kernel masks the future itself when ``mask`` is ``None``.
        groups: ``[Nk]``; queries see only keys of their own group (windows of a vision encoder). ``None`` = one group.
        stretches: for kernels that take several sequences in a row, where each ends: ``[sequences + 1]``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    causal: bool
    groups: torch.Tensor | None = None
    stretches: torch.Tensor | None = None

    def rows(self, sample: int, index: torch.Tensor) -> torch.Tensor:
        """Attention probabilities of some queries of one sample, in float32.

        Args:
            sample: row of the batch.
            index: query positions ``[R]``, perhaps none.

        Returns:
            ``[H, R, Nk]``; each row sums to 1 over the keys it may see.
        """
        query = self.query[sample, :, index].float()
        key = self.key[sample].float()
        heads, kv_heads = query.shape[0], key.shape[0]
        grouped = query.unflatten(0, (kv_heads, heads // kv_heads))
        scores = (grouped @ key.unsqueeze(1).transpose(-1, -2)).flatten(0, 1) * self.scaling
        return self._masked(scores, sample, index).softmax(-1)

    def received(self, sample: int, index: torch.Tensor | None = None) -> torch.Tensor:
        """Attention that each key receives, summed over queries, in float32.

        Rows are computed a few at a time, so that no full map exists.

        Args:
            sample: row of the batch.
            index: query positions ``[R]``; ``None`` = all.

        Returns:
            ``[H, Nk]``.
        """
        if index is None:
            index = torch.arange(self.query.shape[2], device=self.query.device)
        total = torch.zeros(self.query.shape[1], self.key.shape[2], device=self.query.device)
        for rows in index.split(max(1, min(_ROWS, self.key.shape[2] // 4))):
            total += self.rows(sample, rows).sum(1)
        return total

    def _masked(self, scores: torch.Tensor, sample: int, index: torch.Tensor) -> torch.Tensor:
        lowest = torch.finfo(scores.dtype).min
        mask = self.mask
        if self.groups is not None:
            scores = scores.masked_fill(self.groups[index].unsqueeze(-1) != self.groups, lowest)
        if mask is not None and mask.dim() == 4:
            row = mask[min(sample, mask.shape[0] - 1), 0, index, : scores.shape[-1]]
            return scores.masked_fill(~row, lowest) if row.dtype == torch.bool else scores + row.float()
        if self.causal and self.query.shape[2] > 1:
            # The last query sees the last key, also when earlier keys come from a cache.
            horizon = index + (self.key.shape[2] - self.query.shape[2])
            future = torch.arange(scores.shape[-1], device=scores.device) > horizon.unsqueeze(-1)
            scores = scores.masked_fill(future, lowest)
        if mask is not None:
            scores = scores.masked_fill(~mask[sample, : scores.shape[-1]].bool(), lowest)
        return scores


Tap = Callable[[Seen], torch.Tensor | None]
"""Looks at an attention call. What it returns, ``[B, Nq, H, d]``, stands for the output of the kernel, which then does
not run; ``None`` = the kernel runs."""
_taps: weakref.WeakKeyDictionary[nn.Module, list[Tap]] = weakref.WeakKeyDictionary()


def _observed(
    base: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """Show the inputs of the kernel ``base`` to the taps of the module, and run it."""
    scaling = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    seen = Seen(
        query,
        key,
        value,
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        stretches=kwargs.get("cu_seq_lens_q"),
    )
    own = [tap(seen) for tap in tuple(_taps.get(module, ()))]
    for output in own:
        if output is not None:
            return output, None
    return run_kernel(base, module, query, key, value, attention_mask, **kwargs)


def tap_attention(module: nn.Module, tap: Tap) -> Callable[[], None]:
    """Call ``tap`` with the inputs of every attention call of ``module``; returns the function that detaches it.

    Raises:
        Refused: the module does not dispatch its attention through transformers' registry.
    """
    base = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if base is None:
        raise Refused(
            f"attention scores of {type(module).__name__} cannot be observed: it does not use transformers' "
            "attention registry"
        )
    listeners = _taps.setdefault(module, [])
    listeners.append(tap)
    if not base.startswith(_PREFIX):
        _originals[module] = put_in_front(module, _PREFIX, _observed)

    def detach() -> None:
        if tap in listeners:
            listeners.remove(tap)
        if not listeners and module in _originals:
            module.config = _originals.pop(module)
            _taps.pop(module, None)

    return detach


_originals: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
