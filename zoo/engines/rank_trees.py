"""Trees of fixed shape whose nodes say "the r-th likeliest token at this place": for drafters that rank tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from zoo.engines.trees import ROOT, depths

RankPath = tuple[int, ...]


def parse_paths(text: str) -> tuple[RankPath, ...]:
    """Paths written as digits, ``"0 1 00 01"``: the ranks from the root to each node."""
    return tuple(tuple(map(int, path)) for path in text.split())


class RankTree:
    """The shape of a tree.

    Args:
        paths: ranks (0 = the likeliest) from the root to each node, in any order, closed under prefixes.

    Attributes:
        paths: in order of depth, then of ranks. They serve as kinds of ``zoo.engines.drafting.Draft``.
        parents: see ``zoo.engines.trees``.
        ranks: the last rank of each path.
        depths: length of each path.
        width: ranks that occur: one more than the highest.
        inner: the root and all nodes with children, in order, each with its place among them.

    Raises:
        ValueError: a node's parent is missing, or a path stands twice.
    """

    def __init__(self, paths: Iterable[RankPath]) -> None:
        self.paths = sorted(paths, key=lambda path: (len(path), path))
        place: dict[RankPath, int] = {(): ROOT}
        for node, path in enumerate(self.paths):
            if path in place or path[:-1] not in place:
                raise ValueError(f"the path {path} of a tree stands twice, or its parent is missing")
            place[path] = node
        self.parents = [place[path[:-1]] for path in self.paths]
        self.ranks = [path[-1] for path in self.paths]
        self.depths = depths(self.parents)
        self.width = max(self.ranks, default=-1) + 1
        self.inner = {node: place for place, node in enumerate(sorted({ROOT, *self.parents}))}

    def within(self, depth: int, width: int) -> RankTree:
        """The part that is at most ``depth`` deep and uses the first ``width`` ranks."""
        return RankTree(path for path in self.paths if len(path) <= depth and max(path) < width)

    def level(self, depth: int) -> list[int]:
        """Nodes at a depth, from 1."""
        return [node for node, own in enumerate(self.depths) if own == depth]

    def fill_by_depth(self, candidates: Sequence[Sequence[int]]) -> list[int]:
        """Tokens of all nodes when guesses depend on the depth alone: ``candidates[depth - 1][rank]``."""
        return [candidates[depth - 1][rank] for depth, rank in zip(self.depths, self.ranks, strict=True)]

    def fill_by_parent(self, candidates: Sequence[Sequence[int]], nodes: Iterable[int]) -> list[int]:
        """Tokens of ``nodes`` when guesses depend on the path: ``candidates[inner[parent]][rank]``."""
        return [candidates[self.inner[self.parents[node]]][self.ranks[node]] for node in nodes]


def likeliest_tree(chances: Sequence[Sequence[float]], nodes: int) -> RankTree:
    """The tree of ``nodes`` nodes that accepts most tokens when guesses at different depths are independent.

    A node is worth the product of the chances along its path, never more than its parent: so always adding the most
    valuable node to the tree gives the best tree (Medusa, 2401.10774, section 2.3.3).

    Args:
        chances: ``[depth][rank]``: how often that rank was right at that depth, falling with the rank.
        nodes: wanted; fewer when there are no more.
    """
    chosen: list[RankPath] = []
    heap: list[tuple[float, int, RankPath]] = []

    def offer(parent: RankPath, worth: float) -> None:
        if len(parent) < len(chances):
            for rank, chance in enumerate(chances[len(parent)]):
                heapq.heappush(heap, (-worth * chance, len(parent) + 1, (*parent, rank)))

    offer((), 1.0)
    while heap and len(chosen) < nodes:
        worth, _, path = heapq.heappop(heap)
        chosen.append(path)
        offer(path, -worth)
    return RankTree(chosen)
