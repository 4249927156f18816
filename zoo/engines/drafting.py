"""What a drafter is: the interface between the loop of ``zoo.engines.decoding`` and the methods that propose tokens.

A method of a few dozen lines subclasses ``Drafter``. Self-speculation reaches the target and its cache through
``Context``; drafters that recycle the target's logits or hidden states declare it in ``needs`` and find them in
``Verified``; draft models keep a cache of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from zoo.engines.sampling import Warper
from zoo.engines.trees import depths, is_chain

Need = Literal["logits", "prompt-logits", "hidden-states"]
Kind = tuple[str | int | float, ...]


@dataclass
class Draft:
    """What a drafter proposes after the last committed token of one sample.

    Attributes:
        tokens: ``n`` token ids.
        parents: ``[n]``, see ``zoo.engines.trees``; ``None`` is a chain.
        laws: full distributions ``[n, V]`` (float32, on the model's device) from which the tokens were drawn, after
            ``Context.scores``; siblings carry the law of the first of them. ``None`` = the tokens were not drawn but
            chosen, and the one-hot rule applies. Only looked at when sampling.
        replacement: ``False`` when siblings were drawn without replacement.
        seen: bool ``[n + 1, n + 1]`` in place of the ancestors (row 0 the root), for drafts that are not only a tree.
        depths: distances from the root ``[n]`` in place of those of the tree; they set the position ids.
        kinds: what sort of guess each node is ``[n]`` (its source, rank, confidence ...): nodes of one kind are about
            equally often right. It changes nothing in verification; see ``zoo.engines.draft_budget``.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] | None = None
    laws: torch.Tensor | None = None
    replacement: bool = True
    seen: np.ndarray | None = None
    depths: list[int] | None = None
    kinds: Sequence[Kind] | None = None

    @property
    def chain(self) -> bool:
        """Whether plain causal attention and consecutive positions are right for it."""
        return self.seen is None and self.depths is None and (self.parents is None or is_chain(self.parents))

    def within(self, depth: int) -> Draft:
        """The part that is at most ``depth`` deep (deeper tokens could not be committed any more)."""
        if self.seen is not None or self.depths is not None:
            return self
        if self.parents is None or is_chain(self.parents):
            if len(self.tokens) <= depth:
                return self
            return self.only(range(depth))
        deep = depths(self.parents)
        if max(deep) <= depth:
            return self
        return self.only([index for index, level in enumerate(deep) if level <= depth])

    def only(self, nodes: Sequence[int]) -> Draft:
        """The part of a tree (or chain) that consists of ``nodes``: ascending, each with all its ancestors."""
        place = {old: new for new, old in enumerate(nodes)}
        parents = self.parents
        return Draft(
            [self.tokens[node] for node in nodes],
            None if parents is None else [place.get(parents[node], parents[node]) for node in nodes],
            None if self.laws is None else self.laws[list(nodes)],
            self.replacement,
            kinds=None if self.kinds is None else [self.kinds[node] for node in nodes],
        )


@dataclass
class Row:
    """One sample. ``tokens`` is the live list of its prompt (padding left out) and all committed tokens.

    ``limit`` is how deep a draft may be in this step: near the end of the generation or of the model's positions it
    falls to 0. A cap on the number of nodes, should a drafter have one, is the drafter's own.
    """

    index: int
    tokens: list[int]
    prompt: int
    limit: int = 0
    done: bool = False

    @property
    def generated(self) -> int:
        """Tokens committed so far."""
        return len(self.tokens) - self.prompt


@dataclass
class Verified:
    """What the target said about the root and the nodes of one sample's draft (or about its prompt).

    ``tokens[0]`` is the root, ``tokens[i + 1]`` node ``i``; after the prefill they are the prompt. What the drafter did
    not ask for is ``None``. Methods that shorten the prompt inside the model leave fewer rows than tokens after the
    prefill; rows and tokens are aligned at their ends.

    Attributes:
        tokens: ``[n + 1]``.
        path: accepted nodes, from the root downwards.
        committed: tokens committed by this step: those of ``path`` and one of the target's own, unless cut short.
        logits: ``[n + 1, V]``, raw.
        hidden_states: per layer (embeddings first, as transformers orders them) ``[n + 1, D]``.
        prefill: whether the tokens are the prompt.
        draft: what was verified: the drafter's own proposal, or what was left of it.
    """

    tokens: list[int]
    path: list[int]
    committed: list[int]
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    prefill: bool = False
    draft: Draft = field(default_factory=Draft)


Rule = Callable[[Draft, torch.Tensor], tuple[list[int], int]]
"""From a draft and the target's distributions ``[n + 1, V]`` (float32, warped) to accepted nodes and the next token."""


@dataclass(frozen=True)
class Context:
    """What a drafter may know about the run.

    Attributes:
        model: the target.
        cache: the target's cache (to be read; self-speculation may extend it if it crops it back).
        sample: ``False`` = greedy.
        eos: ids that end a sample.
        max_length: total length, prompt included, at which generation ends.
        columns: which columns of the cache count for which sample just now, ``[batch, past]``; ``None`` = all.
    """

    model: Any
    cache: Any
    sample: bool
    eos: frozenset[int]
    max_length: int
    warper: Warper
    starts: tuple[int, ...]
    columns: Callable[[], torch.Tensor | None] = lambda: None

    def scores(self, row: Row, drafted: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """A drafter's ``logits [V]`` after ``row.tokens + drafted``, through the target's processors.

        Returns float32 ``[V]``; its softmax is the law to draw a draft token from.
        """
        if self.warper.plain:
            return logits.float()
        return self.warper.after(row.index, self.starts[row.index] + row.generated, drafted, logits)


class Drafter:
    """Proposes tokens. All methods have a default, so a drafter writes only what it uses.

    A drafter lives as long as its method is applied; ``start`` begins a new ``generate``. Batches: either write
    ``propose_row``, or ``propose`` for all rows at once.
    """

    needs: frozenset[Need] = frozenset()
    """What ``observe`` wants to see of the target's forward passes: logits of drafts, of the prompt, hidden states."""
    tree: bool = False
    """Whether drafts may be anything else than chains."""
    costly: bool = False
    """Whether drafting takes passes through a model, so that it has to pay like verification."""
    rule: Rule | None = None
    """What decides when sampling, in place of exact rejection sampling: methods that give up the target's law for
    longer drafts. Greedy decoding is not affected."""

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """A new generation begins; the prompts are in ``rows``, nothing is committed yet."""

    def propose(self, rows: Sequence[Row]) -> list[Draft]:
        """One draft for each of ``rows`` (those still running with a ``limit`` above 0)."""
        return [self.propose_row(row) for row in rows]

    def propose_row(self, row: Row) -> Draft:
        """A draft to follow ``row.tokens``; an empty one makes this a plain step."""
        return Draft()

    def observe(self, row: Row, verified: Verified) -> None:
        """Called after the prefill and after every step, when ``row.tokens`` already holds what was committed."""

    def stop(self) -> None:
        """The generation is over (also after an exception)."""

    def close(self) -> None:
        """The method is taken off the model."""
