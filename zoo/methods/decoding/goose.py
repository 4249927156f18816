"""Goose: a deep spine where text is copied, shallow branches where the model's own habits are recycled.

"Goose: Anisotropic Speculation Trees for Training-Free Speculative Decoding" (2604.02047). Two sources that cost
nothing are combined according to how far each can be trusted: continuations of n-grams found in the context form one
chain, successors recorded from earlier passes form branches along it; one pass with tree attention verifies all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.engines.ngrams import NgramIndex
from zoo.engines.successors import SuccessorTable
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register
from zoo.methods.decoding._spine_tree import SPINE, Shape, isotropic_tree, spine_tree

if TYPE_CHECKING:
    from zoo.models import LoadedModel

PROLONG_ABOVE = 0.6
"""Confidence above which the chain is prolonged."""


class ContextMatcher:
    """Continuations of the last few tokens at their first place in the context.

    Args:
        lengths: of the n-grams, longest first.
        max_chain: longest continuation.
        long_match: from how many tokens on a continuation counts as long.
    """

    def __init__(self, lengths: Sequence[int], max_chain: int, long_match: int) -> None:
        self.index = NgramIndex(lengths)
        self.max_chain = max_chain
        self.long_match = long_match

    def propose(self, tokens: Sequence[int]) -> tuple[list[int], float]:
        """What followed the longest n-gram that ends ``tokens``, and the confidence in it (``[], 0`` without any).

        It is 1 when the n-gram occurred before more than once and always went on alike; otherwise it grows with the
        length of the continuation, to 0.9.
        """
        for n in reversed(self.index.lengths):
            ngram = tokens[-n:]
            start = self.index.behind(ngram) if len(ngram) == n else None
            if start is None:
                continue
            chain = self.index.tokens[start : start + self.max_chain]
            if self.index.unanimous(ngram):
                return chain, 1.0
            beyond = len(chain) - self.long_match
            if beyond >= 0:
                return chain, min(0.9, 0.7 + 0.2 * beyond / 12)
            return chain, 0.6 * len(chain) / self.long_match
        return [], 0.0

    def prolong(
        self, tokens: Sequence[int], chain: Sequence[int], confidence: float, limit: int
    ) -> list[int]:
        """Go on proposing behind ``tokens + chain`` up to ``limit``; of a sure chain until a link is not sure."""
        longest = self.index.lengths[-1]
        drafted = list(chain)
        while len(drafted) < limit:
            more, sure = self.propose([*tokens[-longest:], *drafted][-longest:])
            if not more:
                break
            drafted += more
            if confidence == 1 and sure < 1:
                break
        return drafted[:limit]


@dataclass
class _Sample:
    """What is known of one sample: its text, and which share of its spines was accepted of late."""

    matcher: ContextMatcher
    acceptance: float = 0.5


class GooseDrafter(Drafter):
    """Both sources begin anew with every generation; the samples of a batch share the successors."""

    tree = True

    def __init__(self, method: Goose) -> None:
        self.method = method
        # The logits of a whole prompt can cost more than all that its successors save: not where every draft must pay.
        self.needs = frozenset({"logits"} if method.budget == "auto" else {"logits", "prompt-logits"})
        self.shape = Shape(**{name: getattr(method, name) for name in Shape.__dataclass_fields__})
        self.table = SuccessorTable(method.top_k, pairs=True)
        self.samples: list[_Sample] = []

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """Read the prompts."""
        method = self.method
        self.table = SuccessorTable(method.top_k, pairs=True)
        self.samples = [
            _Sample(ContextMatcher(method.ngram_lengths, method.max_chain, method.long_match)) for _ in rows
        ]

    def propose_row(self, row: Row) -> Draft:
        """A tree where successors of the last token are known, else the copied chain alone."""
        sample = self.samples[row.index]
        matcher = sample.matcher
        matcher.index.extend(row.tokens[len(matcher.index.tokens) :])
        root, before = row.tokens[-1], row.tokens[-2] if len(row.tokens) > 1 else None
        if self.method.tree == "isotropic":
            return isotropic_tree(root, before, self.table, self.shape).draft
        chain, confidence = matcher.propose(row.tokens)
        if self.method.tree == "copies" or not self.table.after(root, before):
            chain = chain[: self.shape.extended_budget - 1]
            return Draft(chain, kinds=[(SPINE, round(confidence, 1), min(i, 3)) for i in range(len(chain))])
        if confidence > PROLONG_ABOVE:
            limit = int(self.shape.extended_budget * confidence)
            chain = matcher.prolong(row.tokens, chain, confidence, limit)
        return spine_tree(root, before, chain, confidence, sample.acceptance, self.table, self.shape).draft

    def observe(self, row: Row, verified: Verified) -> None:
        """Record the successors of every token that was seen, and how the spine fared."""
        if verified.logits is None:
            return
        tokens, draft = verified.tokens, verified.draft
        if verified.prefill:
            tokens = tokens[len(tokens) - len(verified.logits) :]
            self.table.harvest(tokens, verified.logits, [None, *tokens[:-1]])
            return
        place = len(row.tokens) - len(verified.committed) - 2
        # Below a tree the root's pair is not recorded, as in the official code.
        first = None if draft.parents or place < 0 else row.tokens[place]
        parents = draft.parents or range(-1, len(draft.tokens) - 1)
        before = [first, *(tokens[parent + 1] for parent in parents)]
        self.table.harvest(tokens, verified.logits, before)
        spine = {node for node, kind in enumerate(draft.kinds or ()) if kind[0] == SPINE}
        if draft.parents and spine:
            rate = len(spine.intersection(verified.path)) / len(spine)
            sample = self.samples[row.index]
            sample.acceptance = next_acceptance(sample.acceptance, rate, self.method.ema_alpha)

    def stop(self) -> None:
        """Forget the prompts and what the model said."""
        self.samples = []
        self.table = SuccessorTable(self.method.top_k, pairs=True)


def next_acceptance(acceptance: float, rate: float, alpha: float) -> float:
    """Exponential moving average of the share of spine nodes that were accepted."""
    return alpha * rate + (1 - alpha) * acceptance


@register("goose")
class Goose(BudgetedDecoder):
    """Drafts a spine copied from the context with branches of recycled successors."""

    tree: Literal["spine", "isotropic", "copies"] = Field(
        "spine",
        description="Controls with one source: isotropic is the paper's balanced tree of successors, copies a chain.",
    )
    node_budget: int = Field(60, ge=2, le=512, description="Nodes of a tree, with its root.")
    extended_budget: int = Field(
        100, ge=2, le=512, description="Nodes at full confidence, and the longest chain."
    )
    top_k: int = Field(10, ge=1, le=64, description="Successors kept per token and per pair of tokens.")
    ngram_lengths: tuple[int, ...] = Field(
        (5, 4, 3), min_length=1, description="Lengths of the n-grams looked up."
    )
    max_chain: int = Field(20, ge=1, description="Tokens copied per match.")
    long_match: int = Field(8, ge=1, description="From how many copied tokens on a match counts as long.")
    min_score: float = Field(0.01, ge=0, le=1, description="Successors below this score are not drafted.")
    spine_branch_ratio: float = Field(
        0.5, ge=0, le=1, description="Share of the branches along the spine, the others being at the root."
    )
    max_branch_depth: int = Field(6, ge=1, description="Depth from which branches are not extended.")
    ema_alpha: float = Field(0.3, ge=0, le=1, description="Weight of the latest step in spine acceptance.")

    def drafter(self, loaded: LoadedModel, **resources: Any) -> GooseDrafter:
        """Two tables that fill themselves: nothing is needed of the model but its logits."""
        return GooseDrafter(self)
