"""Jacobi iterations against the fixed-point iteration written out; the rest is in ``test_every_drafter.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import build, plain, prompts
from test_speculative_sampling import SMALL, chi_square, ids_of_small, many, pair_law

import zoo
from zoo.models import LoadedModel


def iterate(loaded: LoadedModel, text: list[int], block: int) -> list[list[int]]:
    """All iterates of one block, from copies of the last token to the fixed point, without a cache."""
    guesses = [text[-1]] * block
    iterates = [guesses]
    while True:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([text + guesses])).logits[0]
        corrected = logits[len(text) - 1 : -1].argmax(-1).tolist()
        if corrected == guesses:
            return iterates
        guesses = corrected
        iterates.append(guesses)


@pytest.mark.parametrize("block", [1, 4, 8])
def test_guesses_are_the_jacobi_iterates(block: int) -> None:
    loaded = build(initializer_range=0.1)
    applied = zoo.method("jacobi", block=block).apply(loaded)
    drafter: Any = applied.drafter
    proposed = []
    propose = drafter.propose_row

    def watch(row: Any) -> Any:
        draft = propose(row)
        proposed.append((len(row.tokens), list(draft.tokens)))
        return draft

    drafter.propose_row = watch
    out = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=60)[0].tolist()
    start, _ = proposed[0]
    checked = 0
    iterates: list[list[int]] = []
    for length, guesses in proposed:
        if length + len(guesses) > len(out):
            break
        if len(guesses) == block and guesses == [out[length - 1]] * block:
            start, iterates, number = length, iterate(loaded, out[:length], block), 0
        else:
            number += 1
        # Of the block that began at ``start`` the settled places have been committed.
        assert guesses == iterates[min(number, len(iterates) - 1)][length - start :]
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("kind", ["gqa", "sliding"])
def test_greedy_output_is_that_of_generate(kind: str, rolling: bool) -> None:
    loaded = build(kind=kind, initializer_range=0.05)
    applied = zoo.method("jacobi", rolling=rolling).apply(loaded)
    out = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=60)
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=60))
    stats = applied.report.decoding
    assert stats is not None
    assert sum(stats.accepted) > 0
    if rolling:
        assert set(stats.drafted[:5]) == {8}


def test_what_is_sampled_follows_the_law() -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    applied = zoo.method("jacobi", block=2).apply(loaded)
    assert chi_square(many(applied, ids_of_small(), 600), law) > 1e-3
