"""Matching tokens in pairs, and merging them: the bipartite soft matching of ToMe (arXiv 2210.09461, section 3.2).

Pure tensor functions, batched, without loops over tokens. Similarities are computed in float32 whatever the type of
the model, so that half precision does not change who merges with whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import normalize

from zoo.engines.reductions import Merge
from zoo.errors import BadParameter


@dataclass(frozen=True)
class Matching:
    """Which tokens join which.

    Attributes:
        kept: positions of the tokens that stay, in the order of the output, ``[B, K]``.
        moved: positions of the tokens that join a kept one, ``[B, R]``.
        target: output token (an index into ``kept``) that each of them joins, ``[B, R]``.
        tokens: length of the sequence, ``N``; a token that is neither kept nor moved is dropped.
    """

    kept: torch.Tensor
    moved: torch.Tensor
    target: torch.Tensor
    tokens: int

    @cached_property
    def assignment(self) -> torch.Tensor:
        """Output token that each token becomes or joins, ``[B, N]`` (int64); -1 = dropped."""
        place = self.kept.new_full((self.kept.shape[0], self.tokens), -1)
        order = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        return place.scatter(1, self.kept, order).scatter(1, self.moved, self.target)

    def merge(self, size: torch.Tensor | None = None) -> Merge:
        """The reduction: means weighted with ``size [B, N]``; ``None`` = every token counts as one."""
        weight = torch.ones(self.assignment.shape, device=self.kept.device) if size is None else size
        return Merge(self.assignment, weight, anchor=self.kept, moved=self.moved)

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """Give every token the value of the one that holds it: ``y [B, K, D]`` -> ``[B, N, D]``; dropped: 0."""
        return spread(y, self.assignment)


def spread(y: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Read ``y [B, K, D]`` at ``assignment [B, N]``; -1 reads zeros. Returns ``[B, N, D]``."""
    index = assignment.clamp(min=0).unsqueeze(-1).expand(-1, -1, y.shape[-1])
    return y.gather(1, index).masked_fill(assignment.unsqueeze(-1) < 0, 0)


def bipartite_soft_matching(
    metric: torch.Tensor, r: int, prefix: int = 0, valid: torch.Tensor | None = None
) -> Matching:
    """Merge the ``r`` most similar pairs between tokens at even and at odd positions.

    Every even token proposes its most similar odd token; the ``r`` best proposals merge, several of them perhaps into
    the same odd token. At most half of the free tokens go: ``r`` is cut to ``(N - prefix) // 2``.

    The output begins with the prefix tokens in their order, then come the even tokens that stayed, then the odd ones.
    The former are in ascending position, but by descending similarity when there is no prefix (as in the release).

    Args:
        metric: features that are compared by their cosine, ``[B, N, C]``, e.g. keys averaged over heads.
        r: tokens to remove.
        prefix: tokens at the beginning ([CLS], distillation token, registers) that neither go nor receive others.
        valid: ``[B, N]`` bool; padding (``False``) does not match anything, unless fewer than ``r`` pairs are left.

    Raises:
        ValueError: ``r`` is negative, or nothing is left to match after the cut (check :func:`merges` first).
    """
    tokens = metric.shape[1]
    r = min(r, merges(tokens, prefix))
    if r <= 0:
        raise ValueError(f"there is nothing to merge: {tokens} tokens, {prefix} of them protected, r={r}")
    feature = normalize(metric.float(), dim=-1)
    scores = feature[:, ::2] @ feature[:, 1::2].transpose(1, 2)
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    lowest = float("-inf")
    scores[:, :even_prefix] = lowest
    scores[:, :, :odd_prefix] = lowest
    if valid is not None:
        scores.masked_fill_(~valid[:, ::2, None], lowest).masked_fill_(~valid[:, None, 1::2], lowest)
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    moved, stayed = order[:, :r], order[:, r:]
    if prefix:
        stayed = stayed.sort(-1).values
    odd = torch.arange(tokens // 2, device=metric.device).expand(len(metric), -1)
    target = partner.gather(1, moved) + stayed.shape[1]
    if odd_prefix:
        # Prefix tokens lie at even and odd places; interleave them again. Odd ones never are targets, and the
        # others keep their place behind all even tokens.
        head = torch.arange(prefix, device=metric.device).expand(len(metric), -1)
        kept = torch.cat((head, 2 * stayed[:, even_prefix:], 2 * odd[:, odd_prefix:] + 1), dim=1)
    else:
        kept = torch.cat((2 * stayed, 2 * odd + 1), dim=1)
    return Matching(kept, 2 * moved, target, tokens)


def merges(tokens: int, prefix: int = 0) -> int:
    """The most that one matching can remove from ``tokens``, ``prefix`` of which are protected."""
    return max(0, (tokens - prefix) // 2)


def kth_matching(metric: torch.Tensor, k: int) -> Matching:
    """Merge all but every ``k``-th token: positions ``k - 1, 2k - 1, ...`` stay, the others join the nearest of them.

    A last, incomplete group of ``N mod k`` tokens is dropped, so that exactly ``N // k`` tokens are left.

    Args:
        metric: features that are compared by their cosine, ``[B, N, C]``.
        k: group length, from 2 to ``N``.

    Raises:
        ValueError: ``k`` is out of range.
    """
    batch, tokens = metric.shape[:2]
    if not 2 <= k <= tokens:
        raise ValueError(f"k must be between 2 and the number of tokens ({tokens}), not {k}")
    place = torch.arange(tokens // k * k, device=metric.device).view(-1, k)
    return _join_nearest(metric, place[:, :-1].flatten().expand(batch, -1), place[:, -1].expand(batch, -1))


def random_matching(metric: torch.Tensor, r: int, generator: torch.Generator | None = None) -> Matching:
    """Merge ``r`` tokens drawn at random, each into the most similar of the others.

    Args:
        metric: features that are compared by their cosine, ``[B, N, C]``.
        r: tokens to remove, from 0 to ``N - 1``.
        generator: source of chance, on the device of ``metric``; the survivors come in random order.

    Raises:
        ValueError: ``r`` is out of range.
    """
    batch, tokens = metric.shape[:2]
    if not 0 <= r < tokens:
        raise ValueError(f"r must be between 0 and {tokens - 1}, not {r}")
    order = torch.rand(batch, tokens, generator=generator, device=metric.device).argsort(-1)
    return _join_nearest(metric, order[:, :r], order[:, r:])


def _join_nearest(metric: torch.Tensor, moved: torch.Tensor, kept: torch.Tensor) -> Matching:
    feature = normalize(metric.float(), dim=-1)
    channels = metric.shape[-1]
    sources = feature.gather(1, moved.unsqueeze(-1).expand(-1, -1, channels))
    targets = feature.gather(1, kept.unsqueeze(-1).expand(-1, -1, channels))
    return Matching(kept, moved, (sources @ targets.transpose(1, 2)).argmax(-1), metric.shape[1])


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
            raise BadParameter(f"r has {len(r)} entries, but the model has {layers} blocks: give at most {layers}")
        return [*r, *[0] * (layers - len(r))]
    if layers == 1:
        return [r]
    first = int(r * (1 - inflection))
    step = (2 * r - first - first) / (layers - 1)
    return [int(first + step * layer) for layer in range(layers)]
