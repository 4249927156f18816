"""Confidence, routes and memory of Goose; the trees themselves are checked by the golden cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import build, plain, prompts

import zoo
from zoo.engines.drafting import Drafter, Row, Verified
from zoo.engines.successors import SuccessorTable
from zoo.methods.decoding._spine_tree import SPINE, Shape, isotropic_tree, spine_tree
from zoo.methods.decoding.goose import ContextMatcher, GooseDrafter


def matcher(tokens: list[int], **options: Any) -> ContextMatcher:
    made = ContextMatcher(**({"lengths": (3, 2), "max_chain": 20, "long_match": 8} | options))
    made.index.extend(tokens)
    return made


def test_confidence_grows_with_length_and_agreement() -> None:
    text = [1, 2, *range(10, 16), 1, 2]
    chain, confidence = matcher(text).propose(text)
    assert chain == [*range(10, 16), 1, 2]
    assert confidence == pytest.approx(0.7)
    assert matcher([*text[:5], 1, 2]).propose([1, 2])[1] == pytest.approx(0.6 * 5 / 8)
    alike = [1, 2, 9, 5, 1, 2, 9, 6, 1, 2]
    assert matcher(alike).propose(alike) == ([9, 5, 1, 2, 9, 6, 1, 2], 1.0)
    apart = [1, 2, 9, 5, 1, 2, 8, 6, 1, 2]
    assert matcher(apart).propose(apart)[1] < 1
    assert matcher([1, 2, 3]).propose([1, 2, 3]) == ([], 0.0)


def test_a_chain_is_prolonged_to_its_limit() -> None:
    text = [1, 2, 3, 4, 1, 2]
    made = matcher(text, max_chain=2)
    chain, confidence = made.propose(text)
    assert chain == [3, 4]
    assert made.prolong(text, chain, confidence, 7) == [3, 4, 1, 2, 3, 4, 1]
    assert made.prolong(text, chain, 1.0, 7) == [3, 4, 1, 2], "of a sure chain an unsure link is the last"


def table() -> SuccessorTable:
    made = SuccessorTable(4, pairs=True)
    made.harvest(range(20), torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))
    return made


def test_confidence_makes_the_tree_larger_and_deeper() -> None:
    chain = [*range(5, 15)] * 5
    trees = [spine_tree(1, 0, chain, confidence, 0.1, table(), Shape()) for confidence in (0.0, 0.5, 1.0)]
    sizes = [tree.size for tree in trees]
    spines = [sum(kind[0] == SPINE for kind in tree.kinds) for tree in trees]
    assert sizes == [60, 80, 100]
    assert spines[0] < spines[1] < spines[2] == len(chain)
    assert max(trees[0].depths) >= spines[0]


def test_a_spine_that_fails_gets_shorter() -> None:
    chain = [*range(5, 15)] * 5
    spines = [
        sum(kind[0] == SPINE for kind in spine_tree(1, 0, chain, 0, share, table(), Shape()).kinds)
        for share in (0.1, 0.3, 0.6)
    ]
    assert spines == [int(60 * part) for part in (0.15, 0.30, 0.50)]


def test_the_control_is_balanced() -> None:
    tree = isotropic_tree(1, 0, table(), Shape(node_budget=14))
    assert tree.size == 14
    assert [tree.parents.count(node) for node in range(-1, 3)] == [3, 3, 3, 3]


def test_routes() -> None:
    """A tree where successors of the root are known, a chain where only the context helps, else nothing."""
    drafter = GooseDrafter(zoo.method("goose"))
    row = Row(0, [1, 2, 3, 9, 1, 2, 3], 7)
    drafter.start(None, [row])
    draft = drafter.propose_row(row)
    assert draft.chain
    assert draft.tokens == [9, 1, 2, 3]
    row.tokens.append(30)
    assert drafter.propose_row(row).tokens == []
    drafter.table.harvest([30], torch.arange(20.0).unsqueeze(0))
    assert drafter.propose_row(row).parents is not None


def test_the_acceptance_of_spines_is_followed() -> None:
    drafter = GooseDrafter(zoo.method("goose"))
    row = Row(0, [1, 2, 3, 9, 8, 7, 1, 2, 3], 9)
    drafter.start(None, [row])
    drafter.table.harvest([3], torch.randn(1, 40, generator=torch.Generator().manual_seed(0)))
    draft = drafter.propose_row(row)
    spine = [node for node, kind in enumerate(draft.kinds or ()) if kind[0] == SPINE]
    assert len(spine) == 6
    row.tokens += [*draft.tokens[:2], 33]
    logits = torch.zeros(len(draft.tokens) + 1, 40)
    verified = Verified([3, *draft.tokens], spine[:2], [*draft.tokens[:2], 33], logits, draft=draft)
    drafter.observe(row, verified)
    assert drafter.samples[0].acceptance == pytest.approx(0.3 * 2 / 6 + 0.7 * 0.5)
    assert drafter.table.after(draft.tokens[0], 3), "nodes are recorded behind their parents too"


@pytest.mark.parametrize("tree", ["spine", "isotropic", "copies"])
def test_greedy_output_is_that_of_generate(tree: str) -> None:
    loaded = build(initializer_range=0.05)
    ids = prompts(1, 20)
    applied = zoo.method("goose", tree=tree).apply(loaded)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=80)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=80))
    assert applied.report.decoding is not None
    assert applied.report.decoding.tokens_per_step > 1


def test_the_prompts_own_logits_are_recorded_unless_every_draft_must_pay() -> None:
    loaded = build()
    fixed = zoo.method("goose").apply(loaded).drafter
    assert isinstance(fixed, Drafter)
    assert "prompt-logits" in fixed.needs
    assert GooseDrafter(zoo.method("goose", budget="auto")).needs == {"logits"}
