"""Masks and sums of a shortened sequence, against plain ones."""

from __future__ import annotations

import pytest
import torch

from zoo.engines.probes import Seen
from zoo.engines.reductions import Join, Merge
from zoo.engines.segments import Segment, causal_mask, positions_of, trimmed, weighed


def segment(valid: list[list[bool]], weight: list[list[float]] | None = None) -> Segment:
    real = torch.tensor(valid)
    places = torch.arange(real.shape[1]).expand(len(real), -1)
    counts = None if weight is None else torch.tensor(weight)
    return Segment(0, places, real, real, torch.zeros(len(real), dtype=torch.long), weight=counts)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_key_of_weight_three_gets_what_three_equal_keys_get(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 4, 8, generator=generator)
    whole = [0, 1, 1, 1, 2, 3]  # key 1 stands for three
    seen = torch.tensor([[place <= row for place in whole] for row in range(4)])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :, whole], value[:, :, whole], attn_mask=seen
    )
    short = segment([[True] * 4], [[1.0, 3.0, 1.0, 1.0]])
    mask = weighed(short, causal_mask(short, 4, 4, dtype), torch.float32)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, expected)


def test_new_tokens_see_the_prompt_without_its_padding_and_each_other_in_order() -> None:
    short = segment([[False, True, True], [True, True, True]])
    mask = causal_mask(short, 2, 5)
    assert mask[:, 0].tolist() == [
        [[False, True, True, True, False], [False, True, True, True, True]],
        [[True, True, True, True, False], [True, True, True, True, True]],
    ]
    additive = causal_mask(short, 2, 5, torch.bfloat16)
    assert torch.equal(additive == 0, mask)
    assert additive.dtype == torch.bfloat16


def test_positions_in_a_grid_come_without_the_place_in_the_text() -> None:
    short = segment([[True, True], [True, True]])
    short.columns = torch.tensor([[1, 3], [0, 2]])
    assert positions_of(short, None).tolist() == [[1, 3], [0, 2]]
    given = torch.arange(4 * 2 * 5).view(4, 2, 5)
    expected = [[[given[row, b, place] for place in short.columns[b]] for b in range(2)] for row in (1, 2, 3)]
    assert positions_of(short, given).tolist() == torch.tensor(expected).tolist()
    short.renumbered = torch.tensor([[0, 1], [0, 1]])
    assert positions_of(short, torch.arange(5).unsqueeze(0)).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merges_sum_half_precision_in_single_precision(dtype: torch.dtype, normalise: bool) -> None:
    """In half precision the later of many terms would be lost in the sum."""
    x = (1 + torch.rand(1, 600, 4, generator=torch.Generator().manual_seed(1))).to(dtype)
    weight = torch.full((1, 600), 0.5)
    merge = Merge(
        torch.zeros(1, 600, dtype=torch.long), weight, torch.zeros(1, 1, dtype=torch.long), normalise
    )
    exact = x.double().mean(1) if normalise else 0.5 * x.double().sum(1)
    found = merge.apply(x)
    assert found.dtype == dtype
    assert torch.equal(found[:, 0], exact.to(dtype))
    places = torch.arange(1, 600).unsqueeze(0)
    join = Join(torch.zeros(1, 1, dtype=torch.long), places, torch.zeros_like(places), 600, weight, normalise)
    assert torch.equal(join.apply(x), found)


def test_no_rows_asked_for_are_no_rows() -> None:
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    seen = Seen(query, key, key, None, 0.3, causal=True)
    none = torch.empty(0, dtype=torch.long)
    assert seen.rows(0, none).shape == (4, 0, 6)
    assert seen.received(0, none).tolist() == torch.zeros(4, 6).tolist()


def test_a_trimmed_cache_keeps_the_positions_and_weights_it_was_filled_with() -> None:
    own = segment([[True] * 5, [True] * 5], [[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    own.columns = torch.tensor([[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])
    own.renumbered, own.shift = torch.arange(5).expand(2, -1), torch.tensor([4, 5])
    target = segment([[True, True], [False, True]])
    target.columns, target.shift = torch.tensor([[2, 8], [1, 7]]), torch.tensor([7, 8])
    left = trimmed(own, target, 1)
    assert left.first == 1
    assert left.renumbered is not None
    assert left.weight is not None
    assert left.renumbered.tolist() == [[1, 4], [0, 3]]
    assert left.weight.tolist() == [[2.0, 5.0], [5.0, 2.0]]
    assert left.shift.tolist() == [4, 5]
    assert left.valid.tolist() == [[True, True], [False, True]]
