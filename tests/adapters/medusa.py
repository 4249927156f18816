from __future__ import annotations

from golden_cases import Case, golden

from zoo.engines.drafting import Draft
from zoo.engines.rank_trees import RankTree
from zoo.engines.sampling import typical_path
from zoo.engines.trees import ancestors, children, longest_path, path_to
from zoo.methods.decoding._medusa_heads import RANKS, ranked
from zoo.methods.decoding.medusa import accept_typically


def leaf_rows(parents: list[int]) -> list[list[int]]:
    """Paths to the leaves, root first, in the order of the official code: from the last node to the first."""
    below = children(parents)
    leaves = [node for node in range(len(parents)) if not below[node + 1]]
    return [[0, *(node + 1 for node in path_to(leaf, parents))] for leaf in reversed(leaves)]


def row_of(path: list[int], rows: list[list[int]]) -> int:
    """The first row that begins with an accepted path; the first of all when nothing was accepted."""
    nodes = [0, *(node + 1 for node in path)]
    return next(place for place, row in enumerate(rows) if row[: len(nodes)] == nodes) if path else 0


@golden("medusa", "tree_choices", "tree_indices", "medusa_logits", "tree_logits", "typical_best")
def step(case: Case) -> None:
    paths = [tuple(rank for rank in row if rank >= 0) for row in case.tensor("tree_choices").tolist()]
    tree = RankTree(paths)
    assert ancestors(tree.parents).astype(int).tolist() == case.tensor("attn_mask").int().tolist()
    assert [0, *tree.depths] == case.tensor("position_ids").tolist()
    flat = [rank + RANKS * (depth - 1) + 1 for depth, rank in zip(tree.depths, tree.ranks, strict=True)]
    assert [0, *flat] == case.tensor("tree_indices").tolist()
    rows = leaf_rows(tree.parents)
    assert rows == [[node for node in row if node >= 0] for row in case.tensor("retrieve_indices").tolist()]

    guesses = ranked(case.tensor("medusa_logits"), RANKS).tolist()
    tokens = tree.fill_by_depth(guesses)
    root = int(case.tensor("base_logits").argmax())
    assert [root, *tokens] == case.tensor("tree_candidates").tolist()
    for row, expected in zip(rows, case.tensor("cart_candidates").tolist(), strict=True):
        assert [[root, *tokens][node] for node in row] == expected[: len(row)]

    logits = case.tensor("tree_logits")
    path = longest_path(tokens, tree.parents, logits.argmax(-1).tolist())
    assert len(path) == case.item("greedy_accept")
    assert row_of(path, rows) == case.item("greedy_best")

    p = (logits / case.item("temperature")).softmax(-1)
    limits = {"epsilon": case.item("posterior_threshold"), "alpha": case.item("posterior_alpha")}
    path = typical_path(tokens, tree.parents, p, **limits)
    assert len(path) == case.item("typical_accept")
    assert row_of(path, rows) == case.item("typical_best")
    following = accept_typically(Draft(tokens, tree.parents), p, **limits)
    assert following == (path, int(logits[path[-1] + 1 if path else 0].argmax()))
