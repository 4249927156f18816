"""Counting floating-point operations while they happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Two matrix products: ``[B, H, Lq, d] x [B, H, d, Lk]``, then ``[B, H, Lq, Lk] x [B, H, Lk, dv]``.

    Arguments are shapes. As in torch's own formula, a causal mask is not discounted, and grouped keys are counted
    once per query head that reads them.
    """
    batch, heads, queries, width = query
    return int(2 * batch * heads * queries * key[-2] * (width + value[-1]))


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Fused attention kernels that torch's counter passes over silently: the CPU one, and those of other backends."""
    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    return {
        getattr(torch.ops.aten, name): _attention_flops for name in names if hasattr(torch.ops.aten, name)
    }


@torch.no_grad()
def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of ``work()`` (a multiply-add is two): matrix products, convolutions, fused attention, and operators that
    bring a formula of their own (:func:`zoo.models.selective_scan.scan_flops`).

    Element-wise operations, norms and sorting are not counted, as usual.
    """
    with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter:
        work()
    return int(counter.get_total_flops())
