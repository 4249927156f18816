"""Prompt lookup decoding: what followed the last words before will follow them again.

A. Saxena, "Prompt Lookup Decoding" (2023), https://github.com/apoorvumang/prompt-lookup-decoding. The last
``n`` tokens are looked up earlier in prompt and output; the tokens after that place are the draft. No model
drafts, so it costs nothing, and pays wherever the output copies from the input: summaries, editing, question
answering on a text, code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from zoo.engines.drafting import Context, Draft, Drafter, Row
from zoo.engines.ngrams import NgramIndex
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register

if TYPE_CHECKING:
    from zoo.models import LoadedModel

Rule = Literal["official", "transformers"]


def lookup(
    index: NgramIndex, count: int, rule: Rule, eos: Collection[int] = (), max_length: int | None = None
) -> tuple[list[int], int]:
    """What followed an earlier occurrence of the last tokens; the longest n-gram that fits wins.

    Both rules take the leftmost match that has enough text behind it. Places further right have less, so the leftmost
    occurrence of an n-gram decides alone.

    Args:
        index: of the sequence so far, for n-grams of 1 to the longest wanted.
        count: tokens to copy. ``official`` wants exactly so many, and prefers a shorter n-gram further
            left to a match with less behind it; ``transformers`` takes what there is.
        rule: which of the two.
        eos: ends of sequence, before which the copy stops (``transformers`` only).
        max_length: no token at or behind this place of the sequence is copied (``transformers`` only).

    Returns:
        The copy, empty when nothing fits, and the length of the n-gram that was found.
    """
    tokens = index.tokens
    length = len(tokens)
    for n in reversed(index.lengths):
        start = index.behind(tokens[length - n :]) if n < length else None
        if start is None:
            continue
        end = start + count
        if rule == "official":
            # The second half matters for overlapping matches of short drafts only.
            if end > length or start >= length - n:
                continue
            return tokens[start:end], n
        end = min(end, length if max_length is None else min(length, max_length))
        if start >= end:
            continue
        chunk = tokens[start:end]
        stop = next((place for place, token in enumerate(chunk) if token in eos), len(chunk))
        return chunk[:stop], n
    return [], 0


class PromptLookupDrafter(Drafter):
    """One index per sample, made from its prompt and fed with what is committed."""

    def __init__(self, max_ngram: int, draft_tokens: int, matching: Rule) -> None:
        self.max_ngram = max_ngram
        self.draft_tokens = draft_tokens
        self.matching: Rule = matching
        self.indexes: dict[int, NgramIndex] = {}
        self.eos: frozenset[int] = frozenset()

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """Index the prompts."""
        self.eos = context.eos
        self.indexes = {row.index: NgramIndex(range(1, self.max_ngram + 1)) for row in rows}
        for row in rows:
            self.indexes[row.index].extend(row.tokens)

    def propose_row(self, row: Row) -> Draft:
        """Index what was committed, then look up its end."""
        index = self.indexes[row.index]
        index.extend(row.tokens[len(index.tokens) :])
        copy, n = lookup(index, self.draft_tokens, self.matching, self.eos)
        # A long match is right more often, and so is the rest of a copy once it has begun well.
        return Draft(copy, kinds=[(n, min(place, 3)) for place in range(len(copy))])

    def stop(self) -> None:
        """Forget the prompts."""
        self.indexes = {}


@register("prompt-lookup")
class PromptLookup(BudgetedDecoder):
    """Drafts by copying what followed the last tokens earlier in prompt and output."""

    max_ngram: int = Field(
        3, ge=1, le=16, description="Longest n-gram that is looked up; shorter ones follow."
    )
    draft_tokens: int = Field(10, ge=1, le=256, description="Tokens drafted per step.")
    rule: Rule = Field(
        "official",
        description="Which matches count: 'official' needs all draft_tokens behind the match, 'transformers' takes "
        "a shorter copy too and stops it before an end of sequence.",
    )

    def drafter(self, loaded: LoadedModel, **resources: Any) -> PromptLookupDrafter:
        """A string search: it needs nothing of the model."""
        return PromptLookupDrafter(self.max_ngram, self.draft_tokens, self.rule)
