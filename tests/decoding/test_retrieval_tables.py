"""N-gram index and successor table: what the drafters look up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.engines.ngrams import NgramIndex
from zoo.engines.successors import SuccessorTable


@settings(max_examples=200)
@given(parts=st.lists(st.lists(st.integers(0, 2), max_size=10), max_size=4))
def test_ngrams_against_a_scan(parts: list[list[int]]) -> None:
    index = NgramIndex([3, 1, 2])
    tokens: list[int] = []
    for part in parts:
        index.extend(part)
        tokens += part
        for n in (1, 2, 3):
            for start in range(len(tokens) - n + 1):
                ngram = tokens[start : start + n]
                behind = [end for end in range(n, len(tokens)) if tokens[end - n : end] == ngram]
                assert index.behind(ngram) == (behind[0] if behind else None)
                followers = [tokens[end] for end in behind]
                assert index.unanimous(ngram) == (len(followers) > 1 and len(set(followers)) == 1)


def test_the_last_time_a_token_was_seen_counts() -> None:
    table = SuccessorTable(2)
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0], [0.0, 5.0, 4.0]])
    table.harvest([7, 8, 7], logits)
    assert [token for token, _ in table.after(7)] == [1, 2]
    assert [token for token, _ in table.after(8)] == [0, 2]
    assert table.after(9) == []
    expected = torch.tensor([5.0, 4.0]).softmax(0)
    torch.testing.assert_close(torch.tensor([s for _, s in table.after(7)]), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("pairs", [True, False])
def test_a_pair_is_more_specific_than_its_token(pairs: bool) -> None:
    table = SuccessorTable(1, pairs=pairs)
    table.harvest([5, 5], torch.tensor([[0.0, 1.0], [1.0, 0.0]]), [3, None])
    assert [token for token, _ in table.after(5, 3)] == [1 if pairs else 0]
    assert [token for token, _ in table.after(5, 4)] == [0]
    assert [token for token, _ in table.after(5)] == [0]


def test_more_successors_than_the_vocabulary_has() -> None:
    table = SuccessorTable(8)
    table.harvest([0], torch.tensor([[0.5, 1.0]], dtype=torch.bfloat16))
    assert [token for token, _ in table.after(0)] == [1, 0]
