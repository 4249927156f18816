"""From scores to masks: who stays, under which budget. Pure tensor functions; ``True`` in a mask means kept.

Papers differ in whether the element at the threshold stays (``>=``) or goes (``>``), and in how an index is rounded;
both change counts, so each function says which it does.
"""

from __future__ import annotations

import torch


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """Each row of ``scores [rows, n]`` to zero mean and unit (unbiased) deviation; constant rows become zero.

    Makes layers and modules comparable, so that one threshold can rank all of them.
    """
    deviation = scores.std(dim=-1, keepdim=True) if scores.shape[-1] > 1 else torch.zeros_like(scores)
    return (scores - scores.mean(dim=-1, keepdim=True)) / torch.where(deviation > 0, deviation, 1.0)


def without_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask ``[n]`` without the ``count`` lowest of ``scores [n]``.

    Keeps scores ``>=`` the one at ascending index ``count``: those tied with it stay.
    """
    if count >= scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores >= scores.sort().values[max(count, 0)]


def above_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the shape of ``scores`` without its ``count`` lowest elements.

    Keeps scores ``>`` the ``count``-th smallest: those tied with it go.
    """
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.flatten().sort().values[min(count, scores.numel()) - 1]


def cost_threshold(scores: torch.Tensor, costs: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The score above which units stay so that their summed cost is nearest to ``(1 - sparsity)`` of the total.

    Args:
        scores: ``[n]``, comparable over all units (see ``standardise``).
        costs: ``[n]`` int64, the size of each unit in a common measure.
        sparsity: fraction of the total cost to remove.

    Returns:
        A 0-d tensor; keep units with a score strictly greater.
    """
    ranked, order = scores.sort(descending=True)
    spent = costs[order].cumsum(0)
    return ranked[(spent - (1 - sparsity) * int(costs.sum())).abs().argmin()]


def rank_threshold(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """One threshold over all of ``scores``: the element at descending index ``int(n * (1 - sparsity))``.

    Keep scores strictly greater: exactly that many, when there are no ties.
    """
    ranked = scores.flatten().sort(descending=True).values
    return ranked[min(int(ranked.numel() * (1 - sparsity)), ranked.numel() - 1)]


def sigmoid_keep_ratios(
    importance: torch.Tensor, sparsity: float, slope: float, slack: float = 1.05
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share a keep budget among layers by their importance (CFSP, coarse step).

    Args:
        importance: ``[layers]``; only differences to the mean matter.
        sparsity: mean fraction removed over layers.
        slope: steepness of the sigmoid.
        slack: how far below 1 the largest ratio is pressed when it would exceed 1.

    Returns:
        Sigmoid scores ``[layers]`` and keep ratios ``[layers]``, float64; the ratios average ``1 - sparsity``.
    """
    centred = importance.double() - importance.double().mean()
    scores = 1 / (1 + torch.exp(-slope * centred))
    shares, mean, keep = scores, scores.mean(), 1 - sparsity
    if keep > 0 and shares.max() / mean * keep >= 1:
        # Press the scores towards their mean until the largest keeps just less than everything.
        scale = (
            mean * (1 / keep - 1) / (shares.max() - mean) / slack
            if shares.max() > mean
            else mean.new_zeros(())
        )
        shares = mean + (shares - mean) * scale
        mean = shares.mean()
    return scores, shares / mean * keep


def top_threshold(scores: torch.Tensor, keep_ratio: float, multiple: int | None = None) -> torch.Tensor:
    """The lowest score that stays when about ``keep_ratio`` of ``scores [n]`` stay (keep ``>=``).

    Without ``multiple`` it is the element at descending index ``int(n * keep_ratio)``, which keeps one more than
    that index. With it, the nearest multiple stays: at least one, at most all.
    """
    count = scores.numel()
    if multiple is None:
        index = int(count * keep_ratio)
    else:
        index = max(int((count * keep_ratio + multiple / 2) / multiple), 1) * multiple - 1
    return scores.sort(descending=True).values[min(index, count - 1)]


def keep_one(mask: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """``mask`` itself, or, when it would remove everything, a mask with the best unit kept (both ``[n]``)."""
    if bool(mask.any()):
        return mask
    guarded = mask.clone()
    guarded[scores.argmax()] = True
    return guarded


def round_keeping_sum(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers next to ``values [n]`` that add up to their rounded sum: the largest remainders are rounded up."""
    whole = values.floor()
    missing = round(float((values - whole).sum()))
    return whole.index_add(0, (values - whole).argsort(descending=True)[:missing], whole.new_ones(missing))
