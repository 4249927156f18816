"""The trees of Goose (2604.02047): a long spine of copied tokens with short branches of recycled successors.

Copied tokens are right several times as often as recycled ones: depth goes to the copy, breadth to the successors.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from zoo.engines.drafting import Draft, Kind
from zoo.engines.successors import SuccessorTable
from zoo.engines.trees import ROOT

SPINE, BRANCH = "spine", "branch"


@dataclass(frozen=True)
class Shape:
    """Limits of a tree; the names are those of the method's parameters."""

    node_budget: int = 60
    extended_budget: int = 100
    max_branch_depth: int = 6
    min_score: float = 0.01
    spine_branch_ratio: float = 0.5


@dataclass
class Tree:
    """A tree under construction; the node before the first (``ROOT``) is the last committed token."""

    root: int
    before: int | None
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)

    def add(self, parent: int, token: int, kind: Kind) -> int:
        """A new node; returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        self.kinds.append(kind)
        return len(self.tokens) - 1

    def successors(self, node: int, table: SuccessorTable) -> list[tuple[int, float]]:
        """What the table knows to follow a node behind its parent."""
        if node == ROOT:
            return table.after(self.root, self.before)
        parent = self.parents[node]
        return table.after(self.tokens[node], self.root if parent == ROOT else self.tokens[parent])

    @property
    def size(self) -> int:
        """Nodes with the root."""
        return len(self.tokens) + 1

    @property
    def draft(self) -> Draft:
        """The tree as the loop takes it."""
        return Draft(self.tokens, self.parents, kinds=self.kinds)


def _branch(score: float) -> Kind:
    """Branches whose scores agree within a factor of two are of one kind."""
    return BRANCH, round(math.log2(max(score, 1e-6)))


def spine_tree(
    root: int,
    before: int | None,
    chain: Sequence[int],
    confidence: float,
    acceptance: float,
    table: SuccessorTable,
    shape: Shape,
) -> Tree:
    """The anisotropic tree.

    Args:
        root: the last committed token.
        before: the token before it.
        chain: the copied continuation; may be empty.
        confidence: in the chain, ``[0, 1]``. The more, the larger the tree and the share of its spine.
        acceptance: running share of spine nodes that were accepted.
        table: of recycled successors.
        shape: limits.
    """
    budget = shape.node_budget + int(confidence * (shape.extended_budget - shape.node_budget))
    base = 0.15 if acceptance < 0.2 else 0.30 if acceptance < 0.4 else 0.50
    spine = chain[: int(budget * (base + confidence * (1 - base)))]
    branches = budget - 1 - len(spine)
    along = max(1, int(branches * shape.spine_branch_ratio)) if spine and branches > 0 else 0

    tree = Tree(root, before)
    for place, token in enumerate(spine):
        tree.add(place - 1, token, (SPINE, round(confidence, 1), min(place, 3)))
    frontier: deque[tuple[int, float]] = deque()

    def attach(node: int, allowance: int, copied: int | None) -> None:
        """Up to ``allowance`` successors of ``node`` beside the ``copied`` one."""
        attached = 0
        for token, score in tree.successors(node, table):
            if attached >= allowance:
                return
            if token == copied:
                continue
            if score < shape.min_score:
                return
            new = tree.add(node, token, _branch(score))
            attached += 1
            if tree.depths[new] < shape.max_branch_depth:
                frontier.append((new, score))

    attach(ROOT, branches - along, chain[0] if chain else None)
    # Spine node i gets a share of 1 / i (the paper's proposition has a linear decay, the code this one).
    harmonic = sum(1 / place for place in range(1, len(spine) + 1))
    left = along
    for place in range(1, len(spine) + 1):
        allowance = min(max(1, int(along / place / harmonic)), left)
        left -= allowance
        attach(place - 1, allowance, spine[place] if place < len(spine) else None)
    _extend(tree, frontier, budget, table, shape)
    return tree


def _extend(
    tree: Tree, frontier: deque[tuple[int, float]], budget: int, table: SuccessorTable, shape: Shape
) -> None:
    """Spend what is left of the budget on successors of the branches, first come, the likelier the wider."""
    while frontier and tree.size < budget:
        node, score = frontier.popleft()
        found = tree.successors(node, table)
        width = max(1, min(len(found), math.ceil((budget - tree.size) * score)))
        for token, likelihood in found[: min(width, max(1, table.width // tree.depths[node]))]:
            if tree.size >= budget or likelihood < shape.min_score:
                break
            new = tree.add(node, token, _branch(likelihood))
            if tree.depths[new] < shape.max_branch_depth:
                frontier.append((new, likelihood))


def isotropic_tree(
    root: int, before: int | None, table: SuccessorTable, shape: Shape, branching: int = 3
) -> Tree:
    """The paper's control: every node has the same number of children, whatever their scores."""
    tree = Tree(root, before)
    frontier = deque([ROOT])
    while frontier and tree.size < shape.node_budget:
        node = frontier.popleft()
        for token, score in tree.successors(node, table)[:branching]:
            if tree.size >= shape.node_budget:
                break
            new = tree.add(node, token, _branch(score))
            if tree.depths[new] < shape.max_branch_depth:
                frontier.append(new)
    return tree
