"""The trees of EAGLE, grown while the head drafts: of fixed shape (EAGLE-1), or where the head is confident (EAGLE-2).

Both are fed level by level. The *beam* are the nodes whose successors the head is asked for next; ``sources`` says from
which row of its last output each of them takes its feature, and ``mask`` which drafted tokens it attends to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from zoo.engines.drafting import Draft
from zoo.engines.rank_trees import RankTree
from zoo.engines.trees import ROOT, path_to


class Growth(ABC):
    """A tree being drafted.

    Attributes:
        tokens: of the beam ``[b]``; empty when nothing is left to ask for.
        sources: rows of the head's last output ``[b]``.
        mask: bool ``[b, fed + b]``: what each node of the beam attends to, among all nodes fed so far and the beam.
    """

    tokens: torch.Tensor
    sources: torch.Tensor
    mask: torch.Tensor

    @abstractmethod
    def expand(self, logits: torch.Tensor) -> None:
        """Go on from the head's ``logits [b, V]`` behind the beam."""

    @abstractmethod
    def draft(self) -> Draft:
        """The tree to verify."""


class DynamicTree(Growth):
    """EAGLE-2: the ``width`` likeliest successors of each of the ``width`` likeliest nodes, then the likeliest of all.

    A node's score is the sum of log-probabilities along its path.

    Args:
        logits: of the head behind the last committed token ``[V]``.
        width: nodes in the beam, and successors considered of each.
        nodes: size of the tree that is verified, the last committed token included.
    """

    def __init__(self, logits: torch.Tensor, width: int, nodes: int) -> None:
        self.width = min(width, logits.shape[-1])
        self.nodes = nodes
        self.scores, self.tokens = logits.float().log_softmax(-1).topk(self.width)
        device = logits.device
        self.sources = torch.zeros(self.width, dtype=torch.long, device=device)
        self.mask = torch.eye(self.width, dtype=torch.bool, device=device)
        self.beam = torch.arange(self.width, device=device)
        self.pool = [(self.tokens, self.scores, torch.full_like(self.beam, ROOT))]
        """Tokens, scores and parents (places in the pool) of all nodes considered."""

    def expand(self, logits: torch.Tensor) -> None:
        """Add all successors to the pool; the best of them are the next beam."""
        width = self.width
        own, tokens = logits.float().log_softmax(-1).topk(width)
        scores = (own + self.scores.unsqueeze(1)).flatten()
        tokens = tokens.flatten()
        start = sum(len(part) for part, _, _ in self.pool)
        self.pool.append((tokens, scores, self.beam.repeat_interleave(width)))
        self.scores, best = scores.topk(width)
        self.tokens = tokens[best]
        self.sources = best // width
        self.beam = start + best
        fresh = torch.eye(width, dtype=torch.bool, device=logits.device)
        self.mask = torch.cat((self.mask[self.sources], fresh), dim=1)

    def draft(self) -> Draft:
        """The best nodes of the pool, parents before their children."""
        tokens, scores, parents = (torch.cat(parts) for parts in zip(*self.pool, strict=True))
        # Stable: a child as good as its parent comes behind it, so that no node is kept without its parent.
        order = scores.argsort(descending=True, stable=True)
        kept = order[: self.nodes - 1].sort().values
        above = parents[kept]
        own = scores[kept] - torch.where(above == ROOT, 0.0, scores[above.clamp(min=0)])
        place = torch.searchsorted(kept, above.clamp(min=0))
        return Draft(
            tokens[kept].tolist(),
            torch.where(above == ROOT, ROOT, place).tolist(),
            # Guesses of which the head is equally sure are equally often right.
            kinds=[(max(-6, round(value / math.log(2))),) for value in own.tolist()],
        )


class StaticTree(Growth):
    """EAGLE-1: every node has the successors that a tree of ranks says.

    Args:
        logits: of the head behind the last committed token ``[V]``.
        tree: its shape.
    """

    def __init__(self, logits: torch.Tensor, tree: RankTree) -> None:
        self.tree = tree
        self.inner = tree.inner
        self.guesses = logits.topk(tree.width).indices.unsqueeze(0).tolist()
        self.fed: list[int] = []
        """Nodes whose successors are known, the root left out."""
        self.beam = [ROOT]
        self.device = logits.device
        self._descend(1)

    def expand(self, logits: torch.Tensor) -> None:
        """Remember the successors of the beam, and go one level down."""
        self.guesses += logits.topk(self.tree.width).indices.tolist()
        self.fed += self.beam
        self._descend(self.tree.depths[self.beam[0]] + 1)

    def _descend(self, depth: int) -> None:
        above = {node: row for row, node in enumerate(self.beam)}
        parents = self.tree.parents
        self.beam = [node for node in self.tree.level(depth) if node in self.inner]
        tokens = self.tree.fill_by_parent(self.guesses, self.beam)
        self.tokens = torch.tensor(tokens, dtype=torch.long, device=self.device)
        sources = [above[parents[node]] for node in self.beam]
        self.sources = torch.tensor(sources, dtype=torch.long, device=self.device)
        seen = [path_to(node, parents) for node in self.beam]
        mask = [[node in path for node in (*self.fed, *self.beam)] for path in seen]
        self.mask = torch.tensor(mask, dtype=torch.bool, device=self.device)

    def draft(self) -> Draft:
        """The tree as deep as it has grown."""
        parents = self.tree.parents
        count = sum(self.inner[parent] < len(self.guesses) for parent in parents)
        tokens = self.tree.fill_by_parent(self.guesses, range(count))
        return Draft(tokens, parents[:count], kinds=self.tree.paths[:count])
