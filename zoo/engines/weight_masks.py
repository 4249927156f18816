"""Which single weights of a matrix stay. Scores are ``[out, in]``, and so are the masks: ``True`` means kept.

What weights compete with matters more than how they are scored: all of their matrix, their own output row, or a group
of neighbours in a row (N:M). Ties and rounding change counts, so each function says how it treats them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def highest_in_matrix(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keep what scores more than the element at ascending index ``int(numel * sparsity)`` of the whole matrix.

    That element and those tied with it go: one more than the index. A sparsity of zero keeps everything.
    """
    if sparsity == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    ranked = scores.flatten().sort().values
    return scores > ranked[min(int(ranked.numel() * sparsity), ranked.numel() - 1)]


def highest_in_rows(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Each row loses exactly its ``int(in * sparsity)`` lowest scores; of equal ones, those further left."""
    order = scores.sort(dim=1, stable=True).indices
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], False)


def highest_in_groups(scores: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """N:M sparsity: in each row, ``n`` of every ``m`` consecutive inputs keep their weight, those of highest score.

    A last group that is shorter loses as many weights as a full one, or all it has.

    Args:
        scores: ``[out, in]``.
        group: ``(n, m)``.
    """
    kept, length = group
    rows, columns = scores.shape
    # What pads a short last group scores more than anything, so it counts among the kept.
    padded = F.pad(scores, (0, -columns % length), value=torch.inf).view(rows, -1, length)
    lowest = padded.topk(length - kept, dim=-1, largest=False).indices
    mask = torch.ones_like(padded, dtype=torch.bool).scatter_(-1, lowest, False)
    return mask.view(rows, -1)[:, :columns]
