"""Token Recycling: the candidates that verification throws away are the drafts of later steps.

Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
(2408.08696). A table holds the likeliest successors of every token as of the last time the model saw it, in rejected
drafts too. From the last token a fixed tree is filled by walking that table, and tree attention verifies all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from zoo.engines.drafting import Draft, Drafter, Row, Verified
from zoo.engines.successors import SuccessorTable
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register

if TYPE_CHECKING:
    from zoo.models import LoadedModel

Path = tuple[int, ...]

TEMPLATE: Mapping[str, int] = {
    "": 8,
    "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1,
    "00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1,
    "10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1,
    "000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1,
    "0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1,
    "00000": 2, "00010": 1,
}  # fmt: skip
"""The authors' tree of 80 nodes: how many successors are tried after each path of ranks (0 = the likeliest)."""


class TreeTemplate:
    """The shape of a tree whose nodes are successors of their parents.

    Args:
        paths: ranks from the root to each node, shorter paths first.

    Attributes:
        parents: see ``zoo.engines.trees``.
        ranks: which successor of its parent each node is.
        kinds: the paths themselves, by which acceptance is counted.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        place = {path: node for node, path in enumerate(paths)}
        self.parents = [place.get(path[:-1], -1) for path in paths]
        self.ranks = [path[-1] for path in paths]
        self.kinds = list(paths)

    def fill(self, root: int, table: SuccessorTable) -> list[int]:
        """Tokens of all nodes. A successor that the table does not know is token 0, as in its all-zero beginning."""
        tokens: list[int] = []
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            known = table.after(root if parent < 0 else tokens[parent])
            tokens.append(known[rank][0] if rank < len(known) else 0)
        return tokens


@cache
def official_template(width: int) -> TreeTemplate:
    """The authors' tree, without the nodes whose rank is not below ``width``."""
    paths: list[Path] = [()]
    for path in paths:
        children = min(width, TEMPLATE.get("".join(map(str, path)), 0))
        paths.extend((*path, rank) for rank in range(children))
    return TreeTemplate(paths[1:])


class TokenRecyclingDrafter(Drafter):
    """One table for all samples and requests; it is never forgotten while the method is applied."""

    needs = frozenset({"logits"})
    tree = True

    def __init__(self, template: TreeTemplate, width: int) -> None:
        self.template = template
        self.table = SuccessorTable(width)

    def propose_row(self, row: Row) -> Draft:
        """Fill the tree from the last token; nothing when that was never seen."""
        root = row.tokens[-1]
        if not self.table.after(root):
            return Draft()
        template = self.template
        return Draft(template.fill(root, self.table), template.parents, kinds=template.kinds)

    def observe(self, row: Row, verified: Verified) -> None:
        """Recycle the logits of the root and of every node, accepted or not."""
        if verified.prefill:
            return
        assert verified.logits is not None
        self.table.harvest(verified.tokens, verified.logits)


@register("token-recycling")
class TokenRecycling(BudgetedDecoder):
    """Drafts a fixed tree of the successors that earlier passes found likely."""

    top_k: int = Field(8, ge=1, le=64, description="Successors kept per token (K in the paper).")

    def drafter(self, loaded: LoadedModel, **resources: Any) -> TokenRecyclingDrafter:
        """A table that fills itself: it needs nothing of the model."""
        return TokenRecyclingDrafter(official_template(self.top_k), self.top_k)
