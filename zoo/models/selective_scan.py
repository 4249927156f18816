"""The selective scan of a state-space layer, ``h_t = a_t h_{t-1} + b_t`` and ``y_t = C_t h_t``, in plain torch.

On a CPU it goes token by token, through stretches of the sequence short enough to stay in the cache: its time then
grows with the number of tokens and nothing else. On an accelerator, where every step is a launch, all chunks of about
``sqrt(N)`` tokens run side by side. Both are the recurrence itself, exact and stable.

It is an operator of its own, ``zoo::selective_scan``: FLOP counters, which pass over element-wise work, find its
formula (:func:`scan_flops`), and training does not keep the states of all tokens but computes them again in the
backward pass, as Mamba does (arXiv 2312.00752, section 3.3.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

_STRETCH = 2**17
"""Numbers of state that fit into the cache of one core, twice."""


def selective_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    elapsed: torch.Tensor,
    rate: torch.Tensor,
    write: torch.Tensor,
    read: torch.Tensor,
) -> torch.Tensor:
    """Mamba's S6 layer (arXiv 2312.00752, section 3.2) without its skip connection.

    ``h_t = exp(elapsed_t A) h_{t-1} + step_t B_t x_t`` and ``y_t = C_t h_t``.

    Args:
        x: what enters, ``[B, N, C]``.
        step: size of the step at each token, positive, ``[B, N, C]``.
        elapsed: time since the token before, ``[B, N, C]``; Mamba's is ``step``.
        rate: ``A``, negative, ``[C, S]``.
        write: ``B_t``, ``[B, N, S]``.
        read: ``C_t``, ``[B, N, S]``.

    Returns:
        ``[B, N, C]``.
    """
    return _scan(x, step, elapsed, rate, write, read)


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _scan(
    x: torch.Tensor,
    step: torch.Tensor,
    elapsed: torch.Tensor,
    rate: torch.Tensor,
    write: torch.Tensor,
    read: torch.Tensor,
) -> torch.Tensor:
    form = token_by_token if x.device.type == "cpu" else in_chunks
    return form(x, step, elapsed, rate, write, read)


@_scan.register_fake
def _shape(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
    with torch.enable_grad():
        output = in_chunks(*inputs)
    return torch.autograd.grad(output, inputs, gradient)


_scan.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.zoo.selective_scan)
def scan_flops(x: Any, step: Any, elapsed: Any, rate: Any, *others: Any, **known: Any) -> int:
    """FLOPs of the recurrence, whatever the form it is computed in; arguments are shapes.

    For each token and channel one for ``step x``, and for each of its ``S`` states seven: ``elapsed A`` and its
    exponential, the product with ``B_t``, a multiply-add for ``h_t``, and one for ``C_t h_t``.
    """
    batch, tokens, channels = x
    return int(batch * tokens * channels * (7 * rate[1] + 1))


def token_by_token(
    x: torch.Tensor,
    step: torch.Tensor,
    elapsed: torch.Tensor,
    rate: torch.Tensor,
    write: torch.Tensor,
    read: torch.Tensor,
) -> torch.Tensor:
    """:func:`selective_scan`, one step per token; not differentiable, because states are written in place."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    state = x.new_zeros(len(x), *rate.shape)
    length = max(1, _STRETCH // state.numel())
    for first in range(0, x.shape[1], length):
        here = slice(first, first + length)
        decay, states = _terms(x[:, here], step[:, here], elapsed[:, here], rate, write[:, here])
        for let_through, added in zip(decay.unbind(1), states.unbind(1), strict=True):
            state = added.addcmul_(let_through, state)
        y[:, here] = (states @ read[:, here].unsqueeze(-1)).squeeze(-1)
    return y


def in_chunks(
    x: torch.Tensor,
    step: torch.Tensor,
    elapsed: torch.Tensor,
    rate: torch.Tensor,
    write: torch.Tensor,
    read: torch.Tensor,
) -> torch.Tensor:
    """:func:`selective_scan` in about ``2 sqrt(N)`` steps, differentiable; holds the states of all tokens."""
    states = linear_recurrence(*_terms(x, step, elapsed, rate, write))
    return (states @ read.unsqueeze(-1)).squeeze(-1)


def _terms(
    x: torch.Tensor, step: torch.Tensor, elapsed: torch.Tensor, rate: torch.Tensor, write: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token lets through of the state before it, and what it adds: ``[B, N, C, S]`` each."""
    return torch.exp(elapsed.unsqueeze(-1) * rate), (step * x).unsqueeze(-1) * write.unsqueeze(2)


def linear_recurrence(decay: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """All states of ``h_t = decay_t * h_{t-1} + added_t``, beginning with ``h = 0``.

    The sequence is cut into about ``sqrt(N)`` chunks of ``sqrt(N)`` tokens. All chunks run side by side from an empty
    state, then the state that enters each chunk is added, weakened by what the chunk lets through: the recurrence in
    another order of additions, in which every factor lies in ``[0, 1]``.

    Args:
        decay: ``[B, N, ...]``, in ``[0, 1]``.
        added: likewise.

    Returns:
        ``[B, N, ...]``.
    """
    length = decay.shape[1]
    size = max(1, math.isqrt(length))
    missing = -length % size
    behind = [0, 0] * (decay.dim() - 2) + [0, missing]
    decay = F.pad(decay, behind, value=1.0).unflatten(1, (-1, size))
    added = F.pad(added, behind).unflatten(1, (-1, size))
    states = [added[:, :, 0]]
    for place in range(1, size):
        states.append(torch.addcmul(added[:, :, place], decay[:, :, place], states[-1]))
    own = torch.stack(states, 2)
    let_through = decay.cumprod(2)
    entering = [torch.zeros_like(own[:, 0, 0])]
    for chunk in range(own.shape[1] - 1):
        entering.append(torch.addcmul(own[:, chunk, -1], let_through[:, chunk, -1], entering[-1]))
    carried = torch.stack(entering, 1).unsqueeze(2)
    return torch.addcmul(own, let_through, carried).flatten(1, 2)[:, :length]
