"""Where the original tokens are after a chain of reductions.

Recording costs nothing while the model runs: the reductions' own index tensors are kept, and composed when somebody
asks, for a picture or to bring features back to full length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from zoo.engines.reductions import Absorb, Join, Keep, Merge, Reduction, Transform


def spread(y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Read ``y [B, K, D]`` at ``assignment [B, N]``; -1 reads zeros. Returns ``[B, N, D]``."""
    index = assignment.clamp(min=0).unsqueeze(-1).expand(-1, -1, y.shape[-1])
    return y.gather(1, index).masked_fill(assignment.unsqueeze(-1) < 0, 0)


def share(reduction: Reduction, weight: torch.Tensor) -> torch.Tensor:
    """Sum ``weight [B, N]`` over the tokens that each output token takes in: ``[B, K]``."""
    if isinstance(reduction, Keep):
        return reduction.apply(weight)
    if isinstance(reduction, Absorb):
        return reduction.apply(weight.unsqueeze(-1)).squeeze(-1)
    if isinstance(reduction, Transform):
        return (reduction.matrix.detach().to(weight.dtype) @ weight.unsqueeze(-1)).squeeze(-1)
    slot = torch.where(reduction.assignment < 0, reduction.length, reduction.assignment)
    return weight.new_zeros(len(weight), reduction.length + 1).scatter_add(1, slot, weight)[:, :-1]


class Trace:
    """A chain of reductions of one batch of sequences.

    Args:
        batch: sequences.
        tokens: length before the first reduction, ``N``.
        device: where the indices are.
    """

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self.batch, self.tokens, self.device = batch, tokens, device
        self._links: list[tuple[Callable[[], torch.Tensor], int]] = []

    def __len__(self) -> int:
        return len(self._links)

    @property
    def length(self) -> int:
        """Tokens after the last reduction, ``K``."""
        return self._links[-1][1] if self._links else self.tokens

    def add(self, reduction: Reduction) -> None:
        """Append one step; holds index tensors (a linear map: its matrix), but no gradient graph."""
        self._links.append((_step(reduction, self.length), reduction.length))

    def sources(self) -> torch.Tensor:
        """How much of each original token is in each token now, ``[B, K, N]`` in float32.

        Drops and merges give 0 and 1; a linear map gives its weights.
        """
        mapped = self._compose()
        return mapped if mapped.dim() == 3 else _one_hot(mapped, self.length)

    def spread(self, y: torch.Tensor) -> torch.Tensor:
        """Features of the tokens now, brought to the original positions: ``y [B, K, D]`` -> ``[B, N, D]``.

        A dropped token gets zeros. After a linear map a position gets the mean of the tokens it went into, weighted
        with its share in each.
        """
        mapped = self._compose()
        if mapped.dim() == 2:
            return spread(y, mapped)
        back = mapped.transpose(1, 2)
        back = back / back.sum(-1, keepdim=True).clamp(min=torch.finfo(back.dtype).tiny)
        return back.to(y.dtype) @ y

    def _compose(self) -> torch.Tensor:
        """All steps in one: an assignment ``[B, N]`` (int64; -1 = dropped), or a matrix ``[B, K, N]``."""
        current = torch.arange(self.tokens, device=self.device).expand(self.batch, -1)
        length = self.tokens
        for link, after in self._links:
            step = link()
            if step.dim() == 2 and current.dim() == 2:
                current = torch.where(current < 0, -1, step.gather(1, current.clamp(min=0)))
            else:
                left = step.float() if step.dim() == 3 else _one_hot(step, after)
                current = left @ (current if current.dim() == 3 else _one_hot(current, length))
            length = after
        return current


def _step(reduction: Reduction, tokens: int) -> Callable[[], torch.Tensor]:
    """What makes the assignment ``[B, N]`` or the matrix ``[B, K, N]`` of one reduction, on demand."""
    if isinstance(reduction, Keep):
        return partial(_assignment, reduction, tokens)
    if isinstance(reduction, Join):
        indices = replace(reduction, weight=None)  # weights may hold a gradient graph
        return lambda: indices.assignment
    if isinstance(reduction, Absorb):
        return lambda: reduction.matrix.detach()
    joined = reduction.assignment if isinstance(reduction, Merge) else reduction.matrix.detach()
    return lambda: joined


def _assignment(keep: Keep, tokens: int) -> torch.Tensor:
    """``[B, N]``: output place of each token, -1 for those that left."""
    index = keep.index if keep.valid is None else torch.where(keep.valid, keep.index, tokens)
    places = torch.arange(keep.length, device=index.device).expand_as(index)
    return index.new_full((len(index), tokens + 1), -1).scatter(1, index, places)[:, :-1]


def _one_hot(assignment: torch.Tensor, length: int) -> torch.Tensor:
    slots = torch.arange(length, device=assignment.device)
    return (assignment.unsqueeze(1) == slots[:, None]).float()
