"""The longest suffix of a context in other text: an automaton for text that grows, an array for text that stays.

``SuffixAutomaton`` takes a text token by token and tells after each the longest suffix that occurred before, at
amortised constant cost. ``SuffixArray`` sorts a finished corpus once and then finds all places of a phrase by binary
search; it is two flat arrays, so a large corpus costs little memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

START = 0
"""The state of the empty match."""


class SuffixAutomaton:
    """The smallest automaton of all substrings of a text (Blumer et al. 1985), built online.

    A state stands for the substrings that end at the same places of the text; ``length`` is that of its longest one,
    ``link`` the state of the longest suffix that also ends elsewhere, ``end`` where its first occurrence ends (the
    number of tokens up to there). About 1.5 states per token, of one dictionary each.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.end = [0]
        self._last = START

    def add(self, token: int) -> None:
        """Append one token."""
        self.tokens.append(token)
        size = len(self.tokens)
        state = self._state({}, START, size, size)
        place, self._last = self._last, state
        while place >= 0 and token not in self.next[place]:
            self.next[place][token] = state
            place = self.link[place]
        if place < 0:
            return
        target = self.next[place][token]
        if self.length[target] == self.length[place] + 1:
            self.link[state] = target
            return
        # The target also stands for longer substrings, which do not end here: its shorter ones get their own state.
        clone = self._state(
            dict(self.next[target]), self.link[target], self.length[place] + 1, self.end[target]
        )
        while place >= 0 and self.next[place].get(token) == target:
            self.next[place][token] = clone
            place = self.link[place]
        self.link[target] = self.link[state] = clone

    def _state(self, following: dict[int, int], link: int, length: int, end: int) -> int:
        self.next.append(following)
        self.link.append(link)
        self.length.append(length)
        self.end.append(end)
        return len(self.link) - 1

    def follow(self, match: tuple[int, int], token: int) -> tuple[int, int]:
        """The longest suffix of ``matched text + token`` that occurs in the text.

        Args:
            match: state and length of the match so far; ``(START, 0)`` at first.
            token: the next token.

        Returns:
            State and length of the new match, ``(START, 0)`` when even the token alone does not occur.
        """
        state, length = match
        while state != START and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        if token not in self.next[state]:
            return START, 0
        return self.next[state][token], length + 1

    def behind(self, state: int, count: int) -> list[int]:
        """What followed the first occurrence of a state's substrings: at most ``count`` tokens."""
        end = self.end[state]
        return self.tokens[end : end + count]

    def with_room(self, state: int, count: int) -> int:
        """The longest suffix of a match (its own state included) whose first occurrence has ``count`` tokens behind it.

        When none has, the shortest suffix that is not empty.
        """
        while state != START and self.link[state] != START and len(self.tokens) - self.end[state] < count:
            state = self.link[state]
        return state


class SuffixArray:
    """All places of a corpus, sorted by the text that begins there.

    Args:
        tokens: the corpus, integers ``[N]``.
        order: a permutation of the places ``[N]``, as ``build`` makes it.
        depth: by how many tokens the places are sorted; longer phrases cannot be looked for.
    """

    def __init__(self, tokens: np.ndarray, order: np.ndarray, depth: int) -> None:
        self.tokens = tokens
        self.order = order
        self.depth = depth

    @classmethod
    def build(cls, tokens: np.ndarray, depth: int) -> SuffixArray:
        """Sort by prefix doubling: places ranked by their first ``k`` tokens are ranked by ``2 k`` in one more sort.

        As no phrase is longer than ``depth``, ``log2(depth)`` sorts are enough. Takes about ``40 N`` bytes meanwhile.
        """
        size = len(tokens)
        _, rank = np.unique(tokens, return_inverse=True)
        order = np.argsort(rank, kind="stable")
        span = 1
        while span < depth:
            # What runs over the end of the corpus comes first, as a shorter word does in a dictionary.
            later = np.zeros(size, dtype=np.int64)
            later[: max(0, size - span)] = rank[span:] + 1
            order = np.lexsort((later, rank))
            changed = (np.diff(rank[order]) != 0) | (np.diff(later[order]) != 0)
            rank = np.empty(size, dtype=np.int64)
            rank[order] = np.concatenate(([0], np.cumsum(changed))) if size else []
            span *= 2
        return cls(tokens, order.astype(np.int32 if size < 2**31 else np.int64), depth)

    def places(self, phrase: Sequence[int]) -> np.ndarray:
        """Where in the corpus ``phrase`` (at most ``depth`` tokens) begins: ``[hits]``, in sorted order."""
        wanted = list(phrase)
        size = len(wanted)

        def text(place: int) -> list[int]:
            return self.tokens[place : place + size].tolist()

        first = bisect_left(self.order, wanted, key=text)
        return self.order[first : bisect_right(self.order, wanted, lo=first, key=text)]

    def longest_suffix(self, context: Sequence[int], shortest: int) -> tuple[np.ndarray, int]:
        """Places of the longest suffix of ``context`` that occurs, and its length (0 when below ``shortest``).

        A suffix occurs only if all shorter ones do, so the search goes upwards and ends at the first miss.
        """
        found, length = self.order[:0], 0
        for size in range(shortest, min(self.depth, len(context)) + 1):
            places = self.places(context[len(context) - size :])
            if not len(places):
                break
            found, length = places, size
        return found, length
