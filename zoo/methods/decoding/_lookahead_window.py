"""Of lookahead decoding (2402.02057): the pool of n-grams, the window of guesses, and who attends to whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoo.engines.trees import ROOT, ancestors, depths

Ngram = tuple[int, ...]


class NgramPool:
    """The latest continuations of every token.

    Args:
        size: continuations kept per token (G in the paper); of more, those not seen for longest go.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._after: dict[int, dict[Ngram, None]] = {}

    def add(self, token: int, continuation: Ngram) -> None:
        """Remember a continuation as the latest."""
        known = self._after.setdefault(token, {})
        known.pop(continuation, None)
        if len(known) >= self.size:
            del known[next(iter(known))]
        known[continuation] = None

    def add_text(self, tokens: Sequence[int], length: int) -> None:
        """Remember the ``length`` tokens behind each token of a text."""
        for place in range(len(tokens) - length):
            self.add(tokens[place], tuple(tokens[place + 1 : place + length + 1]))

    def after(self, token: int) -> list[Ngram]:
        """Continuations, the latest last."""
        return list(self._after.get(token, ()))


class Window:
    """Guesses for the next places, one level per Jacobi iteration, the oldest first.

    Level 0 guesses the places behind the last committed token, level ``l`` those that begin ``l`` places further on.
    At first there is only level 0, longer than it stays; every pass adds a level until there are N - 1.

    Args:
        levels: N - 1.
        fill: level 0 at first, ``W + N - 3`` guesses.
    """

    def __init__(self, levels: int, fill: Sequence[int]) -> None:
        self.most = levels
        self.levels = [list(fill)]

    @property
    def sizes(self) -> list[int]:
        """Guesses per level; ``[W - 1, W, ..., W]`` when there are all."""
        return [len(level) for level in self.levels]

    @property
    def tokens(self) -> list[int]:
        """All guesses, level by level."""
        return [token for level in self.levels for token in level]

    def ngrams(self, last: int, new: Sequence[int]) -> list[tuple[int, Ngram]]:
        """The diagonals: each token with its continuation of N - 1 tokens.

        Args:
            last: the committed token before the window.
            new: what the model says behind each guess of the newest level ``[W]``.
        """
        if len(self.levels) < self.most:
            return []
        keys = [last, *self.levels[0]]
        return list(zip(keys, zip(*self.levels[1:], new, strict=True), strict=True))

    def advance(self, new: Sequence[int]) -> None:
        """One Jacobi iteration: the window moves on by a place, or gets another level."""
        if len(self.levels) == self.most:
            self.levels = [self.levels[1][1:], *self.levels[2:], list(new)]
        elif len(self.levels) == 1:
            self.levels = [self.levels[0][1:], list(new)]
        else:
            self.levels = [*(level[1:] for level in self.levels), list(new[1:])]


def layout(sizes: Sequence[int], guesses: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Who attends to whom, and where everybody stands: last token, window and guesses.

    Level 0 is causal behind the last token. Place ``j`` of a further level sees the first ``j + 1`` tokens of that
    first row and the ``j``-th guesses of the levels in between. Guesses see the last token and their own ancestors.

    Args:
        sizes: of the levels.
        guesses: parents of the n-grams' nodes (see ``zoo.engines.trees``), counted among themselves.

    Returns:
        bool ``[n + 1, n + 1]``, and distances from the last token ``[n]``.
    """
    first, window = sizes[0] + 1, sum(sizes)
    seen = np.zeros((window + 1 + len(guesses),) * 2, dtype=bool)
    seen[:first, :first] = np.tri(first)
    places = list(range(1, first))
    starts: list[int] = []
    start = first
    for level, size in enumerate(sizes[1:], 1):
        rows = np.arange(size)
        starts.append(start)
        seen[start : start + size, :first] = np.tri(size, first)
        for column in starts:
            seen[start + rows, column + rows] = True
        places += (level + first - size + rows).tolist()
        start += size
    seen[start:, 0] = True
    seen[start:, start:] = ancestors(guesses)[1:, 1:]
    return seen, places + depths(guesses)


def merged(ngrams: Sequence[Ngram]) -> tuple[list[int], list[int]]:
    """Tokens and parents of the tree of ``ngrams``: what they begin with in common is verified once."""
    tokens: list[int] = []
    parents: list[int] = []
    nodes: dict[Ngram, int] = {(): ROOT}
    for ngram in ngrams:
        for length in range(1, len(ngram) + 1):
            if ngram[:length] not in nodes:
                parents.append(nodes[ngram[: length - 1]])
                tokens.append(ngram[length - 1])
                nodes[ngram[:length]] = len(tokens) - 1
    return tokens, parents
