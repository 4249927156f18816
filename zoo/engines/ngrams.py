"""Earlier occurrences of the last few tokens of a growing sequence, at a cost that does not depend on its length."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Ngram = tuple[int, ...]


class NgramIndex:
    """First place of every n-gram, and whether it was always followed by the same token.

    Args:
        lengths: the n to index.
    """

    def __init__(self, lengths: Collection[int]) -> None:
        self.lengths = sorted(set(lengths))
        self.tokens: list[int] = []
        # Place behind the first occurrence; whether all later ones were followed alike (None: there were none).
        self._seen: dict[Ngram, tuple[int, bool | None]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``; each costs one dictionary entry per length."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        for n in self.lengths:
            # An n-gram counts once something follows it: the last one is what will be looked up.
            for end in range(max(start, n), len(self.tokens)):
                ngram = tuple(self.tokens[end - n : end])
                behind, alike = self._seen.get(ngram, (None, None))
                if behind is None:
                    self._seen[ngram] = (end, None)
                elif alike is not False:
                    self._seen[ngram] = (behind, self.tokens[behind] == self.tokens[end])

    def behind(self, ngram: Sequence[int]) -> int | None:
        """Place behind the first occurrence of ``ngram``; ``None`` when it does not occur before the end."""
        return self._seen.get(tuple(ngram), (None, None))[0]

    def unanimous(self, ngram: Sequence[int]) -> bool:
        """Whether ``ngram`` occurred more than once and was always followed by the same token."""
        return bool(self._seen.get(tuple(ngram), (None, None))[1])
