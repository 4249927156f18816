"""The selective scan of a state-space layer, ``h_t = a_t h_{t-1} + b_t``, in plain torch and without a step per token.

The sequence is cut into about ``sqrt(N)`` chunks of ``sqrt(N)`` tokens. All chunks run side by side from an empty
state, then the state that enters each chunk is added, weakened by what the chunk lets through. That is the recurrence
itself in another order of additions: exact, stable (every factor lies in ``[0, 1]``), differentiable, and
``2 sqrt(N)`` steps.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def linear_recurrence(decay: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """All states of ``h_t = decay_t * h_{t-1} + added_t``, beginning with ``h = 0``.

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
    decay = torch.exp(elapsed.unsqueeze(-1) * rate)
    added = (step * x).unsqueeze(-1) * write.unsqueeze(2)
    states = linear_recurrence(decay, added)
    return (states @ read.unsqueeze(-1)).squeeze(-1)
