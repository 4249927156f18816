"""REST: drafts are retrieved from a datastore of text, as the tree of its most frequent continuations.

He et al., "REST: Retrieval-Based Speculative Decoding" (2311.08252). The longest end of the context that occurs in the
store is looked up by binary search in a suffix array; what followed at all those places is counted prefix by prefix,
and the most frequent prefixes form the tree that is verified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from zoo.engines.datastore import Datastore, open_datastore
from zoo.engines.drafting import Draft, Drafter, Row
from zoo.engines.trees import ROOT
from zoo.errors import BadInput
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register

if TYPE_CHECKING:
    from zoo.models import LoadedModel


def frequent_prefixes(continuations: np.ndarray, choices: int) -> tuple[list[int], list[int], list[int]]:
    """The tree of the ``choices`` most frequent prefixes; of equally frequent ones the smaller token sequence.

    A prefix is at least as frequent as what it begins, so the best-first search takes parents before children and
    the result is closed under prefixes.

    Args:
        continuations: token ids ``[hits, length]``, -1 behind the end of the corpus.
        choices: nodes wanted.

    Returns:
        Tokens, parents (see ``zoo.engines.trees``) and counts, ``[n]`` each with ``n <= choices``.
    """
    tokens: list[int] = []
    parents: list[int] = []
    counts: list[int] = []
    length = continuations.shape[1]
    # Minus the count, the prefix, its parent's node, and which continuations begin with its parent.
    heap: list[tuple[int, tuple[int, ...], int, np.ndarray]] = []

    def extend(prefix: tuple[int, ...], node: int, rows: np.ndarray) -> None:
        """Make the most frequent one-token extensions of a prefix, with which the ``rows`` begin, candidates."""
        column = continuations[rows, len(prefix)]
        values, numbers = np.unique(column[column >= 0], return_counts=True)
        for place in np.lexsort((values, -numbers))[:choices]:
            heappush(heap, (-int(numbers[place]), (*prefix, int(values[place])), node, rows))

    extend((), ROOT, np.arange(len(continuations)))
    while heap and len(tokens) < choices:
        count, prefix, parent, rows = heappop(heap)
        tokens.append(prefix[-1])
        parents.append(parent)
        counts.append(-count)
        if len(prefix) < length:
            extend(prefix, len(tokens) - 1, rows[continuations[rows, len(prefix) - 1] == prefix[-1]])
    return tokens, parents, counts


class RestDrafter(Drafter):
    """Looks every context up in one store."""

    tree = True

    def __init__(self, store: Datastore, method: Rest) -> None:
        self.store = store
        self.method = method

    def retrieve(self, context: Sequence[int]) -> tuple[np.ndarray, int]:
        """Continuations ``[hits, continuation]`` of the longest end of ``context`` in the store, and its length."""
        array, method = self.store.array, self.method
        places, length = array.longest_suffix(context[-method.max_match :], method.min_match)
        index = places[: method.max_hits, None].astype(np.int64) + length + np.arange(method.continuation)
        inside = index < len(array.tokens)
        found = array.tokens[np.where(inside, index, 0)].astype(np.int64)
        return np.where(inside, found, -1), length

    def propose_row(self, row: Row) -> Draft:
        """The tree of the most frequent continuations; nothing when no two tokens of the context are in the store."""
        continuations, length = self.retrieve(row.tokens[-self.method.max_match :])
        tokens, parents, counts = frequent_prefixes(continuations, self.method.draft_tokens)
        # A node's share of its parent's count says how likely it is, the more so the longer the match.
        kinds = []
        for parent, count in zip(parents, counts, strict=True):
            share = count / (len(continuations) if parent == ROOT else counts[parent])
            kinds.append((length.bit_length(), max(-5, round(math.log2(share)))))
        return Draft(tokens, parents, kinds=kinds)


@register("rest")
class Rest(BudgetedDecoder):
    """Drafts the most frequent continuations of the context's end in a store of text."""

    datastore: str = Field(
        "news",
        description="Text to retrieve from: a packaged name, a text file, or a datastore built before (.safetensors).",
    )
    draft_tokens: int = Field(64, ge=1, le=512, description="Nodes of a tree.")
    max_match: int = Field(16, ge=2, le=64, description="Longest end of the context that is looked up.")
    min_match: int = Field(2, ge=1, description="Shortest end of the context that is looked up.")
    continuation: int = Field(10, ge=1, le=64, description="Tokens taken behind each match.")
    max_hits: int = Field(5000, ge=1, description="Matches counted (k in the paper).")

    def drafter(
        self, loaded: LoadedModel, *, datastore: Datastore | None = None, **resources: Any
    ) -> RestDrafter:
        """Open the store, or build it when it is the first time, unless one is given.

        Raises:
            BadInput: no tokenizer to build it with, or nothing to build it from.
        """
        if datastore is None:
            if loaded.tokenizer is None:
                raise BadInput(f"rest needs text in the model's tokens, and {loaded.ref} has no tokenizer")
            datastore = open_datastore(self.datastore, loaded.tokenizer, self.max_match)
        return RestDrafter(datastore, self)
