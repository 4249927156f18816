"""The tree template, and a table that is fed by rejected drafts too."""

from __future__ import annotations

from collections import Counter

import torch
from decoders import build, plain, prompts

import zoo
from zoo.engines.successors import SuccessorTable
from zoo.engines.trees import depths
from zoo.methods.decoding.token_recycling import TokenRecyclingDrafter, official_template


def test_the_template_of_the_authors() -> None:
    template = official_template(8)
    assert Counter(depths(template.parents)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert template.kinds[:9] == [*((rank,) for rank in range(8)), (0, 0)]
    assert template.kinds[-3:] == [(0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0)]


def test_a_narrower_table_cuts_the_template() -> None:
    template = official_template(2)
    assert max(template.ranks) == 1
    assert set(template.kinds) == {path for path in official_template(8).kinds if max(path) < 2}


def test_a_tree_is_filled_by_walking_the_table() -> None:
    table = SuccessorTable(2)
    logits = torch.zeros(2, 6)
    logits[0, [3, 4]] = torch.tensor([2.0, 1.0])
    logits[1, [5, 1]] = torch.tensor([2.0, 1.0])
    table.harvest([0, 3], logits)
    tokens = dict(zip(official_template(2).kinds, official_template(2).fill(0, table), strict=True))
    assert tokens[0,] == 3
    assert tokens[1,] == 4
    assert tokens[0, 0] == 5
    assert tokens[0, 1] == 1
    assert tokens[1, 0] == 0, "nothing is known of token 4"


def test_the_table_outlives_a_request_and_knows_rejected_tokens() -> None:
    loaded = build(initializer_range=0.05)
    applied = zoo.method("token-recycling").apply(loaded)
    drafter = applied.drafter
    assert isinstance(drafter, TokenRecyclingDrafter)
    ids = prompts()
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=40)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=40))
    cold = applied.report.decoding
    generated = set(out[0, ids.shape[1] :].tolist())
    known = {token for token in range(loaded.model.config.vocab_size) if drafter.table.after(token)}
    assert known - generated, "successors of rejected nodes are recycled"
    applied.generate(input_ids=ids, do_sample=False, max_new_tokens=40)
    warm = applied.report.decoding
    assert cold is not None
    assert warm is not None
    assert warm.tokens_per_step > cold.tokens_per_step > 1
