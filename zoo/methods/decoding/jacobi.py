"""Jacobi decoding: guess a block of tokens, let the model correct all of them at once, until nothing changes.

Santilli et al., "Accelerating Transformer Inference for Translation via Parallel Decoding" (2305.10427). Greedy
decoding solves a triangular system of equations. A Jacobi iteration evaluates all of them in one pass, and each settles
at least one more token as greedy decoding would. Settled tokens are committed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register

if TYPE_CHECKING:
    from zoo.models import LoadedModel


class JacobiDrafter(Drafter):
    """The guesses that are left of the block, as the latest iteration corrected them."""

    needs = frozenset({"logits"})

    def __init__(self, block: int, rolling: bool) -> None:
        self.block = block
        self.rolling = rolling
        self.guesses: dict[int, list[int]] = {}

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """No guesses yet."""
        self.guesses = {row.index: [] for row in rows}

    def propose_row(self, row: Row) -> Draft:
        """The guesses; a block that is solved is followed by one of copies of the last token."""
        guesses = self.guesses[row.index]
        if self.rolling or not guesses:
            guesses = guesses + [row.tokens[-1]] * (self.block - len(guesses))
        return Draft(guesses, kinds=[(min(place, 8),) for place in range(len(guesses))])

    def observe(self, row: Row, verified: Verified) -> None:
        """One iteration: each guess becomes what the model says behind those before it."""
        if verified.prefill:
            return
        assert verified.logits is not None
        choices = verified.logits.float().argmax(-1).tolist()
        # The last choice lies behind the block.
        end = None if self.rolling else -1
        self.guesses[row.index] = choices[len(verified.committed) : end]

    def stop(self) -> None:
        """Forget the guesses."""
        self.guesses = {}


@register("jacobi")
class Jacobi(BudgetedDecoder):
    """Corrects a block of guesses in parallel until it is what greedy decoding gives."""

    block: int = Field(8, ge=1, le=256, description="Guesses per block.")
    rolling: bool = Field(
        False, description="Refill the block at its end after every pass instead of when it is solved."
    )

    def drafter(self, loaded: LoadedModel, **resources: Any) -> JacobiDrafter:
        """Nothing is needed of the model but its logits."""
        return JacobiDrafter(self.block, self.rolling)
