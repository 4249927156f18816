"""What came after each token: the likeliest next tokens, kept from every forward pass, rejected drafts included.

Logits that verification throws away tell what the model expects after a token. Token Recycling keeps them per token,
Goose per token and per pair of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Successors = list[tuple[int, float]]
"""Token ids and their scores, best first."""


class SuccessorTable:
    """The ``width`` likeliest successors of every token seen so far, as of the last time it was seen.

    Args:
        width: successors kept per token.
        pairs: remember them also per pair (token before, token), which is more specific.
    """

    def __init__(self, width: int, *, pairs: bool = False) -> None:
        self.width = width
        self.pairs = pairs
        self._after: dict[int, Successors] = {}
        self._after_pair: dict[tuple[int, int], Successors] = {}

    def harvest(
        self, tokens: Sequence[int], logits: torch.Tensor, before: Sequence[int | None] | None = None
    ) -> None:
        """Remember the successors of ``tokens``; of a token that comes twice the last time counts.

        Args:
            tokens: ``[n]``.
            logits: what the model said after each of them ``[n, V]``, raw.
            before: the token before each ``[n]``, ``None`` where no pair is to be written.
        """
        best, ids = logits.float().topk(min(self.width, logits.shape[-1]), dim=-1)
        exact = best.softmax(-1)
        # Single tokens are kept in half precision, pairs in full (only the last digits of the scores differ).
        coarse = exact.half().float().tolist()
        entries = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), coarse, strict=True)]
        self._after.update(zip(tokens, entries, strict=True))
        if not self.pairs or before is None:
            return
        for token, previous, row, scores in zip(tokens, before, ids.tolist(), exact.tolist(), strict=True):
            if previous is not None:
                self._after_pair[previous, token] = list(zip(row, scores, strict=True))

    def after(self, token: int, before: int | None = None) -> Successors:
        """Successors of ``token``: those of the pair when there are any, else those of the token; or none."""
        if before is not None:
            found = self._after_pair.get((before, token))
            if found is not None:
                return found
        return self._after.get(token, [])
