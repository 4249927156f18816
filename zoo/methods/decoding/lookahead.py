"""Lookahead decoding: the model's own parallel guesses, pooled as n-grams and verified beside the next guesses.

Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (2402.02057). Each pass carries
two things beside the last token: a window of guesses for the next W places, N - 1 Jacobi iterations deep, and the
n-grams of the pool that begin with the last token. The window's diagonals are new n-grams for the pool.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.engines.trees import DETACHED, ROOT
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register
from zoo.methods.decoding._lookahead_window import NgramPool, Window, layout, merged

if TYPE_CHECKING:
    from zoo.models import LoadedModel


@dataclass
class _Sample:
    window: Window
    pool: NgramPool
    prompt: list[int]
    random: np.random.Generator

    def some(self, count: int) -> list[int]:
        """Tokens drawn from the prompt."""
        places = self.random.integers(0, len(self.prompt), count)
        return [self.prompt[place] for place in places.tolist()]


class LookaheadDrafter(Drafter):
    """Window and pool begin anew with every generation, sample by sample."""

    needs = frozenset({"logits"})
    tree = True

    def __init__(self, method: Lookahead) -> None:
        self.method = method
        self.eos: Collection[int] = ()
        self.samples: list[_Sample] = []

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """Fill level 0 from the prompt."""
        method, self.eos = self.method, context.eos
        self.samples = []
        for row in rows:
            prompt = list(row.tokens) or [0]  # a prompt of embeddings has no ids
            sample = _Sample(
                Window(method.ngram - 1, []),
                NgramPool(method.pool),
                prompt,
                np.random.default_rng(method.seed),
            )
            sample.window.levels[0] = sample.some(method.window + method.ngram - 3)
            if method.pool_from_prompt:
                sample.pool.add_text(prompt, method.ngram - 1)
            self.samples.append(sample)

    def propose_row(self, row: Row) -> Draft:
        """Window and guesses; where the window would reach beyond the end of the generation, guesses only."""
        sample = self.samples[row.index]
        tokens, parents = merged(sample.pool.after(row.tokens[-1]))
        if row.limit < self.method.window + self.method.ngram - 3:
            return Draft(tokens, parents)
        window = sample.window
        seen, places = layout(window.sizes, parents)
        shift = sum(window.sizes)
        riding = [DETACHED] * shift + [ROOT if parent == ROOT else parent + shift for parent in parents]
        return Draft([*window.tokens, *tokens], riding, seen=seen, depths=places)

    def observe(self, row: Row, verified: Verified) -> None:
        """Pool the diagonals and move the window on."""
        if verified.draft.seen is None or verified.logits is None:
            return
        sample = self.samples[row.index]
        window = sample.window
        end = 1 + sum(window.sizes)
        new = verified.logits[end - window.sizes[-1] : end].float().argmax(-1).tolist()
        for token, continuation in window.ngrams(verified.tokens[0], new):
            sample.pool.add(token, continuation)
        # What follows an end of the text would not be of this text.
        window.advance([sample.some(1)[0] if token in self.eos else token for token in new])

    def stop(self) -> None:
        """Forget the samples."""
        self.samples = []


@register("lookahead")
class Lookahead(BudgetedDecoder):
    """Guesses several places in parallel by Jacobi iteration and verifies the n-grams that turned up."""

    ngram: int = Field(5, ge=3, le=32, description="Tokens of an n-gram with its first one (N in the paper).")
    window: int = Field(7, ge=2, le=256, description="Places guessed in parallel (W in the paper).")
    pool: int = Field(
        7, ge=1, le=256, description="N-grams kept, and verified, per first token (G in the paper)."
    )
    pool_from_prompt: bool = Field(False, description="Begin with the n-grams of the prompt.")
    seed: int = Field(0, ge=0, description="Of the first guesses; the output does not depend on it.")

    def drafter(self, loaded: LoadedModel, **resources: Any) -> LookaheadDrafter:
        """It fills itself: nothing is needed of the model but its logits."""
        return LookaheadDrafter(self)
