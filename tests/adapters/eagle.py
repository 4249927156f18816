from __future__ import annotations

import torch
from golden_cases import Case, golden
from torch.testing import assert_close

from zoo.engines.rank_trees import RankTree
from zoo.engines.sampling import accept_siblings
from zoo.engines.trees import ancestors, children, depths, longest_path, path_to
from zoo.methods.decoding._eagle_trees import DynamicTree


def leaf_rows(parents: list[int]) -> list[list[int]]:
    """Paths to the leaves, root first, in the order of the leaves."""
    below = children(parents)
    leaves = [node for node in range(len(parents)) if not below[node + 1]]
    return [[0, *(node + 1 for node in path_to(leaf, parents))] for leaf in leaves]


def first_row(path: list[int], rows: list[list[int]]) -> int:
    nodes = [0, *(node + 1 for node in path)]
    return next(place for place, row in enumerate(rows) if row[: len(nodes)] == nodes)


def retrieved(case: Case) -> list[list[int]]:
    return [[node for node in row if node >= 0] for row in case.tensor("retrieve_indices").tolist()]


@golden("eagle", "logits0", "step_logits", "draft_tokens", "verify_tree_logits", "uniforms", "sample_p")
def dynamic(case: Case) -> None:
    width, total = case.item("top_k"), case.item("total_tokens")
    growth = DynamicTree(case.tensor("logits0"), width, total)
    steps = case.tensor("step_logits")
    assert len(steps) == case.item("depth")
    committed = len(case.tensor("prompt_ids"))
    for level, logits in enumerate(steps):
        assert growth.tokens.tolist() == case.tensor("beam_input_ids")[level].tolist()
        assert case.tensor("beam_position_ids")[level].tolist() == [committed - 1 + level] * width
        mask = growth.mask
        growth.expand(logits)
    assert torch.equal(mask.float(), case.tensor("beam_tree_mask_last").float())

    draft = growth.draft()
    parents = draft.parents
    assert parents is not None
    root = int(case.tensor("prompt_ids")[-1])
    assert [root, *draft.tokens] == case.tensor("draft_tokens").tolist()
    assert [0, *depths(parents)] == case.tensor("tree_position_ids").tolist()
    assert ancestors(parents).astype(int).tolist() == case.tensor("tree_mask").int().tolist()
    rows = leaf_rows(parents)
    if case.item("sort_retrieve"):
        rows.sort(key=lambda row: [*row, len(parents) + 2])
    assert rows == retrieved(case)
    for row, expected in zip(rows, case.tensor("candidates").tolist(), strict=True):
        assert [[root, *draft.tokens][node] for node in row] == expected[: len(row)]

    logits = case.tensor("verify_tree_logits")
    path = longest_path(draft.tokens, parents, logits.argmax(-1).tolist())
    assert len(path) == case.item("greedy_accept")
    assert (first_row(path, rows) if path else 0) == case.item("greedy_best")

    uniforms = case.tensor("uniforms")
    used = 0
    path = []
    while True:
        node = path[-1] + 1 if path else 0
        p = (logits[node] / case.item("temperature")).softmax(-1)
        depth = len(path) + 1
        # The official code tries siblings in the order of its rows; the loop in that of the nodes (sorted rows).
        options = list(
            dict.fromkeys(row[depth] - 1 for row in rows if row[depth - 1] == node and len(row) > depth)
        )
        tokens = [draft.tokens[option] for option in options]
        found, p = accept_siblings(p, tokens, uniforms[used : used + len(tokens)])
        used += len(options) if found is None else found + 1
        if found is None:
            break
        path.append(options[found])
    assert used == case.item("uniforms_used")
    assert len(path) == case.item("sample_accept")
    assert (first_row(path, rows) if path else 0) == case.item("sample_best")
    assert_close(p, case.tensor("sample_p"), rtol=0, atol=1e-5)


@golden("eagle", "tree_choices", "attn_mask", "tree_indices", "topk")
def static(case: Case) -> None:
    paths = [tuple(rank for rank in row if rank >= 0) for row in case.tensor("tree_choices").tolist()]
    tree = RankTree(paths)
    assert ancestors(tree.parents).astype(int).tolist() == case.tensor("attn_mask").int().tolist()
    assert [0, *tree.depths] == case.tensor("position_ids").tolist()
    width = case.item("topk")
    # Candidates numbered as the official code has them in a row: the root, then the top k of every node expanded.
    numbers = [[1 + width * place + rank for rank in range(width)] for place in range(len(tree.inner))]
    filled = tree.fill_by_parent(numbers, range(len(tree.paths)))
    assert [0, *filled] == case.tensor("tree_indices").tolist()
    assert sorted(leaf_rows(tree.parents)) == sorted(retrieved(case))
