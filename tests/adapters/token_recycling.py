from __future__ import annotations

import torch
from golden_cases import Case, golden

from zoo.engines.successors import SuccessorTable
from zoo.engines.trees import ancestors, children, depths, longest_path
from zoo.methods.decoding.token_recycling import TreeTemplate, official_template


@golden("token-recycling", "template", "topk", "adj_init", "step_logits", "step_input_ids", "adj_after")
def steps(case: Case) -> None:
    paths = [tuple(rank for rank in row if rank >= 0) for row in case.tensor("template").tolist()]
    template = TreeTemplate(paths)
    if len(paths) == 80:
        official = official_template(case.item("topk"))
        assert (official.parents, official.kinds) == (template.parents, template.kinds)
    parents = template.parents
    deep = depths(parents)
    assert [0, *deep] == case.tensor("position_ids").tolist()
    assert ancestors(parents).astype(int).tolist() == case.tensor("attn_mask").tolist()
    assert [parent + 1 for parent in parents] == case.tensor("father_index")[1:].tolist()
    assert template.ranks == case.tensor("child_rank")[1:].tolist()
    starts = [1 + sum(level < depth for level in deep) for depth in range(1, max(deep) + 2)]
    assert starts == case.tensor("depth_starts").tolist()
    below = children(parents)
    leaves = {0 if node < 0 else node + 1 for node in range(len(parents)) if not below[node + 1]}
    rows = [[node for node in row if node >= 0] for row in case.tensor("search_path").tolist()]
    assert {row[-1] for row in rows} == leaves

    width = case.item("topk")
    table = SuccessorTable(width)
    before = case.tensor("adj_init")
    known = before.any(1).nonzero().flatten().tolist()
    vocabulary = before.shape[0]
    for token in known:
        # The recorded successors, best first, come out of logits that fall in their order.
        logits = torch.full((1, vocabulary), -1.0)
        logits[0, before[token]] = torch.arange(width, 0, -1.0)
        table.harvest([token], logits)
    root = case.item("first_token")
    for step, logits in enumerate(case.tensor("step_logits")):
        tokens = template.fill(root, table)
        assert [root, *tokens] == case.tensor("step_input_ids")[step].tolist()
        choices = logits.argmax(-1).tolist()
        path = longest_path(tokens, parents, choices)
        assert len(path) + 1 == case.tensor("accept_len")[step]
        best = rows[case.tensor("best_path")[step]][1 : len(path) + 1]
        assert [tokens[node] for node in path] == [tokens[node - 1] for node in best]
        table.harvest([root, *tokens], logits)
        after = [
            [successor for successor, _ in table.after(token)] or [0] * width for token in range(vocabulary)
        ]
        assert after == case.tensor("adj_after")[step].tolist()
        root = choices[path[-1] + 1 if path else 0]
        assert root == case.tensor("next_token")[step]
