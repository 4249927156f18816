"""SAM-Decoding: a suffix automaton finds the longest earlier match of the context; what followed it is the draft.

Hu et al., "SAM Decoding: Speculative Decoding via Suffix Automaton" (2411.10666). One automaton grows with prompt and
output, another may hold a corpus; a cursor in each moves along with the text at amortised constant cost. When both
matches are short, Token Recycling drafts a tree instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.engines.suffixes import START, SuffixAutomaton
from zoo.errors import BadInput
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register
from zoo.methods.decoding.token_recycling import TokenRecyclingDrafter, official_template

if TYPE_CHECKING:
    from zoo.models import LoadedModel

Match = tuple[int, int]
"""State of an automaton, and how many tokens match."""
NOTHING: Match = (START, 0)
RECYCLED = 8
"""Successors per token of the fallback, the default of Token Recycling."""


class OwnText:
    """Prompt and output of one sample: the automaton, and the match of the text's end with what came before it."""

    def __init__(self) -> None:
        self.automaton = SuffixAutomaton()
        self.match = NOTHING

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``. The match moves first: it may not be with the token itself."""
        for token in tokens:
            self.match = self.automaton.follow(self.match, token)
            self.automaton.add(token)

    def lookup(self, token: int) -> Match:
        """The match after one more token, which is not appended."""
        return self.automaton.follow(self.match, token)

    def draft(self, match: Match, count: int) -> list[int]:
        """What makes a chain of ``count`` with the root; a shorter match is preferred to one with less behind it.

        The official code asks for one token more behind the match than it then takes.
        """
        return self.automaton.behind(self.automaton.with_room(match[0], count), count - 1)


def corpus_automaton(texts: Sequence[Sequence[int]], eos: int | None) -> SuffixAutomaton:
    """The automaton of token sequences, each of which ends with ``eos`` (appended where it is missing)."""
    automaton = SuffixAutomaton()
    for tokens in texts:
        for token in tokens:
            automaton.add(token)
        if eos is not None and (not tokens or tokens[-1] != eos):
            automaton.add(eos)
    return automaton


class SamDrafter(Drafter):
    """Own text and corpus first; when both matches are short, the fallback."""

    def __init__(
        self,
        draft_tokens: int,
        min_match: int,
        corpus_handicap: int,
        corpus: SuffixAutomaton | None,
        fallback: TokenRecyclingDrafter | None,
    ) -> None:
        self.draft_tokens = draft_tokens
        self.min_match = min_match
        self.corpus_handicap = corpus_handicap
        self.corpus = corpus
        self.fallback = fallback
        self.own: list[OwnText] = []
        self.in_corpus: list[Match] = []
        if fallback is not None:
            self.tree = True
            self.needs = fallback.needs

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """Read the prompts."""
        self.own = [OwnText() for _ in rows]
        self.in_corpus = [NOTHING for _ in rows]

    def propose_row(self, row: Row) -> Draft:
        """The continuation of the longer match; equal ones go to the sample's own text."""
        own = self.own[row.index]
        self._read(row, row.tokens[len(own.automaton.tokens) : -1])
        root = row.tokens[-1]
        here = own.lookup(root)
        there = NOTHING if self.corpus is None else self.corpus.follow(self.in_corpus[row.index], root)
        handicapped = there[1] - self.corpus_handicap
        if max(here[1], handicapped) < self.min_match:
            return Draft() if self.fallback is None else self.fallback.propose_row(row)
        if handicapped > here[1]:
            assert self.corpus is not None
            source, length, tokens = "corpus", there[1], self.corpus.behind(there[0], self.draft_tokens - 1)
        else:
            source, length, tokens = "own", here[1], own.draft(here, self.draft_tokens)
        # A match of twice the length is a different kind of match, and so is the rest of a copy that began well.
        size = length.bit_length()
        return Draft(tokens, kinds=[(source, size, min(place, 3)) for place in range(len(tokens))])

    def _read(self, row: Row, tokens: Sequence[int]) -> None:
        self.own[row.index].extend(tokens)
        if self.corpus is not None:
            for token in tokens:
                self.in_corpus[row.index] = self.corpus.follow(self.in_corpus[row.index], token)

    def observe(self, row: Row, verified: Verified) -> None:
        """The fallback learns from every pass."""
        if self.fallback is not None:
            self.fallback.observe(row, verified)

    def stop(self) -> None:
        """Forget the prompts; corpus and recycled successors stay."""
        self.own = []
        self.in_corpus = []


@register("sam-decoding")
class SamDecoding(BudgetedDecoder):
    """Drafts the continuation of the longest suffix that occurred before; else the fallback drafts."""

    draft_tokens: int = Field(
        40,
        ge=2,
        le=256,
        description="Tokens verified per chain, the last committed one included (n_predicts).",
    )
    min_match: int = Field(5, ge=1, description="Shortest match that is drafted from (len_threshold).")
    corpus: str | None = Field(
        None, description="Text that is searched besides the sample's own: a packaged name (news) or a file."
    )
    corpus_handicap: int = Field(
        5, ge=0, description="By how many tokens a match in the corpus must be longer (len_bias)."
    )
    fallback: Literal["token-recycling", "none"] = Field(
        "token-recycling", description="What drafts when no match is long enough."
    )

    def drafter(self, loaded: LoadedModel, **resources: Any) -> SamDrafter:
        """Read the corpus, when there is one.

        Raises:
            BadInput: a corpus, but no tokenizer to read it with.
        """
        corpus = None
        if self.corpus is not None:
            from zoo.data import load_texts

            if loaded.tokenizer is None:
                raise BadInput(
                    f"sam-decoding cannot read a corpus: {loaded.ref} has no tokenizer; leave it out"
                )
            texts = loaded.tokenizer(load_texts(self.corpus), add_special_tokens=False, verbose=False)
            corpus = corpus_automaton(texts["input_ids"], loaded.tokenizer.eos_token_id)
        recycling = self.fallback == "token-recycling"
        fallback = TokenRecyclingDrafter(official_template(RECYCLED), RECYCLED) if recycling else None
        return SamDrafter(self.draft_tokens, self.min_match, self.corpus_handicap, corpus, fallback)
