"""Draft trees: ancestors, depths, masks, the longest accepted path, and the cache entries that stay.

A draft of ``n`` nodes is written as ``parents [n]`` in any topological order: ``-1`` is the root (the last committed
token, which is verified together with the draft), another value the index of an earlier node. In masks and caches the
root comes first, so node ``i`` is row ``i + 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

ROOT = -1
DETACHED = -2
"""Parent of a node that rides along to be evaluated but is never a candidate (the window of lookahead decoding)."""


def is_chain(parents: Sequence[int]) -> bool:
    """Whether the nodes form one chain, in order."""
    return all(parent == index - 1 for index, parent in enumerate(parents))


def depths(parents: Sequence[int]) -> list[int]:
    """Distance of each node from the root, ``[n]``, from 1 (a detached node counts as a child of the root).

    Raises:
        ValueError: a parent does not come before its child.
    """
    result: list[int] = []
    for index, parent in enumerate(parents):
        if not DETACHED <= parent < index:
            raise ValueError(
                f"draft node {index} has parent {parent}: parents must come before their children"
            )
        result.append(1 if parent < 0 else result[parent] + 1)
    return result


def ancestors(parents: Sequence[int]) -> np.ndarray:
    """Which of root and nodes each of them attends to: bool ``[n + 1, n + 1]``, row and column 0 being the root."""
    size = len(parents) + 1
    seen = np.zeros((size, size), dtype=bool)
    seen[0, 0] = True
    for index, parent in enumerate(parents):
        seen[index + 1] = seen[max(parent, ROOT) + 1]
        seen[index + 1, index + 1] = True
    return seen


def tree_mask(
    seen: np.ndarray, columns: torch.Tensor | int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Additive attention mask of a tree behind a cache.

    Args:
        seen: bool ``[w, w]``, from ``ancestors``.
        columns: cached columns in front: their number, or their validity ``[past]`` (bool).
        dtype: type of the hidden states.
        device: where the model is.

    Returns:
        ``[1, 1, w, past + w]``: 0 where attention is allowed, the lowest finite value elsewhere.
    """
    width = len(seen)
    valid = columns if isinstance(columns, torch.Tensor) else None
    past = columns if isinstance(columns, int) else len(columns)
    mask = torch.zeros(1, 1, width, past + width, dtype=dtype, device=device)
    lowest = torch.finfo(dtype).min
    mask[0, 0, :, past:].masked_fill_(torch.from_numpy(~seen).to(device), lowest)
    if valid is not None:
        mask[..., :past].masked_fill_(~valid.to(device), lowest)
    return mask


def children(parents: Sequence[int]) -> list[list[int]]:
    """Children of the root and of each node, in node order: ``result[i + 1]`` are those of node ``i``."""
    result: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for index, parent in enumerate(parents):
        if parent != DETACHED:
            result[parent + 1].append(index)
    return result


def longest_path(tokens: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> list[int]:
    """Greedy rule for a tree: from the root, the deepest run of nodes that are the target's own choices.

    Equal siblings (two nodes with the same parent and token) are allowed; the branch that goes deeper wins, and among
    equals the first.

    Args:
        tokens: token of each node ``[n]``.
        parents: ``[n]``.
        choices: the target's argmax after the root and after each node, ``[n + 1]``.

    Returns:
        Node indices from the root downwards; empty when no child of the root is right.
    """
    length = [0] * (len(tokens) + 1)
    best = 0
    for index, parent in enumerate(parents):
        if parent == DETACHED or tokens[index] != choices[parent + 1]:
            continue
        if parent != ROOT and not length[parent + 1]:
            continue
        length[index + 1] = length[parent + 1] + 1
        if length[index + 1] > length[best]:
            best = index + 1
    return path_to(best - 1, parents)


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    """Nodes from the root (left out) down to ``node``; empty for the root itself."""
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def keep_last(cache: Any, width: int, index: torch.Tensor) -> None:
    """Of the last ``width`` entries of every layer keep those at ``index``, in that order; older entries stay.

    Counting from the end makes it right for layers of different lengths (token methods shorten some of them). Only
    the kept entries are copied.

    Args:
        cache: a ``DynamicCache`` of plain (not sliding-window) layers.
        width: how many entries the draft (or whatever is sorted out) has in each layer.
        index: ``[K]`` for all samples, or ``[batch, K]``; values in ``[0, width)``.
    """
    kept = index.shape[-1]
    for layer in cache.layers:
        if not layer.is_initialized or layer.keys.shape[-2] == 0:
            continue
        for states in (layer.keys, layer.values):
            tail = states[..., -width:, :]
            if index.dim() == 1:
                chosen = tail.index_select(-2, index.to(tail.device))
            else:
                rows = index.to(tail.device)[:, None, :, None].expand(-1, tail.shape[1], -1, tail.shape[3])
                chosen = tail.gather(-2, rows)
            # The copy is complete before it is written, so source and target may overlap.
            tail[..., :kept, :] = chosen
    if kept < width:
        cache.crop(kept - width)
