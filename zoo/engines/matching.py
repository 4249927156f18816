"""Matching tokens in pairs, and merging them: the bipartite soft matching of ToMe (arXiv 2210.09461, section 3).

Pure tensor functions, batched, without loops over tokens. Similarities are computed in float32 whatever the type of
the model, so that half precision does not change who merges with whom.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from zoo.engines.reductions import Join
from zoo.errors import BadParameter


def bipartite_soft_matching(
    metric: torch.Tensor,
    r: int,
    prefix: int = 0,
    weight: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> Join:
    """Merge the ``r`` most similar pairs between tokens at even and at odd positions.

    Every even token proposes its most similar odd token; the ``r`` best proposals merge, several of them perhaps into
    the same odd token. At most half of the free tokens go: ``r`` is cut to ``(N - prefix) // 2``.

    The output begins with the prefix tokens in their order, then come the even tokens that stayed, then the odd ones.
    The former are in ascending position, but by descending similarity when there is no prefix (as in the release).

    Args:
        metric: features that are compared by their cosine, ``[B, N, C]``, e.g. keys averaged over heads.
        r: tokens to remove.
        prefix: tokens at the beginning ([CLS], distillation token, registers) that neither go nor receive others.
        weight: token sizes ``[B, N]`` for the means; ``None`` = every token counts as one.
        valid: ``[B, N]`` bool; padding (``False``) does not match anything, unless fewer than ``r`` pairs are left.

    Raises:
        ValueError: ``r`` is negative, or nothing is left to match after the cut (check :func:`merges` first).
    """
    tokens = metric.shape[1]
    r = min(r, merges(tokens, prefix))
    if r <= 0:
        raise ValueError(f"there is nothing to merge: {tokens} tokens, {prefix} of them protected, r={r}")
    feature = normalize(metric.detach().float(), dim=-1)
    scores = feature[:, ::2] @ feature[:, 1::2].transpose(1, 2)
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    lowest = float("-inf")
    if even_prefix:
        scores[:, :even_prefix] = lowest
    if odd_prefix:
        scores[:, :, :odd_prefix] = lowest
    if valid is not None:
        scores.masked_fill_(~valid[:, ::2, None], lowest).masked_fill_(~valid[:, None, 1::2], lowest)
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    moved, stayed = order[:, :r], order[:, r:]
    if prefix:
        stayed = stayed.sort(-1).values
    # Odd tokens follow all even ones that stayed; a prefix that lies at even and odd places goes in front of both,
    # which leaves the places of the other odd tokens as they are.
    target = partner.gather(1, moved) + stayed.shape[1]
    even, odd = 2 * stayed, torch.arange(1, tokens, 2, device=metric.device).expand(len(metric), -1)
    if odd_prefix:
        head = torch.arange(prefix, device=metric.device).expand(len(metric), -1)
        kept = torch.cat((head, even[:, even_prefix:], odd[:, odd_prefix:]), dim=1)
    else:
        kept = torch.cat((even, odd), dim=1)
    return Join(kept, 2 * moved, target, tokens, weight)


def merges(tokens: int, prefix: int = 0) -> int:
    """The most that one matching can remove from ``tokens``, ``prefix`` of which are protected."""
    return max(0, (tokens - prefix) // 2)


def kth_matching(metric: torch.Tensor, k: int, weight: torch.Tensor | None = None) -> Join:
    """Merge all but every ``k``-th token: positions ``k - 1, 2k - 1, ...`` stay, the others join the nearest of them.

    A last, incomplete group of ``N mod k`` tokens is dropped, so that exactly ``N // k`` tokens are left.

    Args:
        metric: features that are compared by their cosine, ``[B, N, C]``.
        k: group length, from 2 to ``N``.
        weight: token sizes ``[B, N]`` for the means; ``None`` = every token counts as one.

    Raises:
        ValueError: ``k`` is out of range.
    """
    batch, tokens = metric.shape[:2]
    if not 2 <= k <= tokens:
        raise ValueError(f"k must be between 2 and the number of tokens ({tokens}), not {k}")
    place = torch.arange(tokens // k * k, device=metric.device).view(-1, k)
    return _join_nearest(
        metric, place[:, :-1].flatten().expand(batch, -1), place[:, -1].expand(batch, -1), weight
    )


def random_matching(
    metric: torch.Tensor,
    r: int,
    weight: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Join:
    """Merge ``r`` tokens drawn at random, each into the most similar of the others.

    Args:
        metric: features that are compared by their cosine, ``[B, N, C]``.
        r: tokens to remove, from 0 to ``N - 1``.
        weight: token sizes ``[B, N]`` for the means; ``None`` = every token counts as one.
        generator: source of chance, on the device of ``metric``; the survivors come in random order.

    Raises:
        ValueError: ``r`` is out of range.
    """
    batch, tokens = metric.shape[:2]
    if not 0 <= r < tokens:
        raise ValueError(f"r must be between 0 and {tokens - 1}, not {r}")
    order = torch.rand(batch, tokens, generator=generator, device=metric.device).argsort(-1)
    return _join_nearest(metric, order[:, :r], order[:, r:], weight)


def _join_nearest(
    metric: torch.Tensor, moved: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor | None
) -> Join:
    feature = normalize(metric.detach().float(), dim=-1)
    channels = metric.shape[-1]
    sources = feature.gather(1, moved.unsqueeze(-1).expand(-1, -1, channels))
    targets = feature.gather(1, kept.unsqueeze(-1).expand(-1, -1, channels))
    partner = (sources @ targets.transpose(1, 2)).argmax(-1)
    return Join(kept, moved, partner, metric.shape[1], weight)


def merge_schedule(layers: int, r: int | tuple[int, ...], inflection: float = 0.0) -> list[int]:
    """How many tokens each block merges.

    One number is spread on a line from ``r (1 - inflection)`` to ``r (1 + inflection)``, each value cut to an integer;
    a list is filled up with zeros.

    Args:
        layers: number of blocks.
        r: merges per block, or a list of them.
        inflection: slope from -1 (``2 r`` falling to 0) to 1 (0 rising to ``2 r``); 0 = constant.

    Raises:
        BadParameter: the list is longer than the model is deep.
    """
    if not isinstance(r, int):
        if len(r) > layers:
            raise BadParameter(
                f"r has {len(r)} entries, but the model has {layers} blocks: give at most {layers}"
            )
        return [*r, *[0] * (layers - len(r))]
    if layers == 1:
        return [r]
    first = int(r * (1 - inflection))
    step = (2 * r - first - first) / (layers - 1)
    return [int(first + step * layer) for layer in range(layers)]
