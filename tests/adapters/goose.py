from __future__ import annotations

import torch
from golden_cases import Case, golden
from torch.testing import assert_close

from zoo.engines.successors import SuccessorTable
from zoo.engines.trees import ancestors, longest_path
from zoo.methods.decoding._spine_tree import SPINE, Shape, Tree, isotropic_tree, spine_tree
from zoo.methods.decoding.goose import PROLONG_ABOVE, ContextMatcher, next_acceptance


def same_tree(tree: Tree, case: Case, prefix: str) -> None:
    assert [tree.root, *tree.tokens] == case.tensor(f"{prefix}_tokens").tolist()
    assert [-1, *(parent + 1 for parent in tree.parents)] == case.tensor(f"{prefix}_parents").tolist()
    assert [0, *tree.depths] == case.tensor(f"{prefix}_depths").tolist()


@golden("goose", "tokens", "prefill_logits", "trace_chain", "unigram_ids", "tree_tokens", "ema_after")
def step(case: Case) -> None:
    tokens = case.tensor("tokens").tolist()
    matcher = ContextMatcher(
        case.tensor("ngram_lengths").tolist(), case.item("max_chain"), case.item("long_match")
    )
    for end in range(1, len(tokens) + 1):
        matcher.index.extend(tokens[end - 1 : end])
        chain, confidence = matcher.propose(tokens[:end])
        length = case.tensor("trace_chain_len")[end - 1]
        assert chain == case.tensor("trace_chain")[end - 1, :length].tolist()
        assert_close(
            confidence, float(case.arrays["trace_confidence"][end - 1]), rtol=0, atol=1e-6, check_dtype=False
        )
    assert chain == case.tensor("chain").tolist()

    table = SuccessorTable(case.item("top_k"), pairs=True)
    table.harvest(tokens, case.tensor("prefill_logits"), [None, *tokens[:-1]])
    for token, (ids, scores) in enumerate(
        zip(case.tensor("unigram_ids"), case.tensor("unigram_scores"), strict=True)
    ):
        known = table.after(token)
        assert ([successor for successor, _ in known] or [-1] * len(ids)) == ids.tolist()
        if known:
            assert_close(torch.tensor([score for _, score in known]), scores.float(), rtol=0, atol=1e-3)

    if confidence > PROLONG_ABOVE:
        limit = int(case.item("max_extended_chain") * confidence)
        chain = matcher.prolong(tokens, chain, confidence, limit)
    assert chain == case.tensor("extended_chain").tolist()

    shape = Shape(
        case.item("node_budget"),
        case.item("max_extended_chain"),
        case.item("max_branch_depth"),
        case.item("min_score"),
        case.item("spine_branch_ratio"),
    )
    before = case.item("spine_accept_ema")
    tree = spine_tree(tokens[-1], tokens[-2], chain, confidence, before, table, shape)
    same_tree(tree, case, "tree")
    spine = [node for node, kind in enumerate(tree.kinds) if kind[0] == SPINE]
    assert [node + 1 for node in spine] == list(range(1, case.item("spine_end")))
    assert (case.tensor("tree_source")[1:] == 1).nonzero().flatten().tolist() == spine
    assert ancestors(tree.parents).tolist() == case.tensor("ancestor_mask").tolist()
    same_tree(isotropic_tree(tokens[-1], tokens[-2], table, shape), case, "iso")

    path = longest_path(tree.tokens, tree.parents, case.tensor("predictions").tolist())
    assert [node + 1 for node in path] == case.tensor("accepted_path").tolist()
    assert (path[-1] + 1 if path else 0) == case.item("stop_node")
    after = before
    if spine:
        after = next_acceptance(before, len(set(spine) & set(path)) / len(spine), 0.3)
    assert_close(after, case.item("ema_after"), rtol=0, atol=1e-6)
