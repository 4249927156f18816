"""Matching and joining tokens against slow, literal loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

from zoo.engines.matching import (
    bipartite_soft_matching,
    kth_matching,
    merge_schedule,
    merges,
    random_matching,
)
from zoo.engines.provenance import Trace, share, spread
from zoo.engines.reductions import Join, Keep, Merge, Transform
from zoo.errors import BadParameter


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_matching(metric: torch.Tensor, r: int, prefix: int) -> tuple[list[int], dict[int, int]]:
    """Output order of positions and ``moved -> partner``, for one sample, one token at a time."""
    feature = normalize(metric, dim=-1)
    tokens = len(metric)
    even = [i for i in range(tokens) if i % 2 == 0 and i >= prefix]
    odd = [i for i in range(tokens) if i % 2 == 1 and i >= prefix]
    best = {i: max((float(feature[i] @ feature[j]), -j) for j in odd) for i in even}
    ranked = sorted(even, key=lambda i: -best[i][0])
    r = min(r, (tokens - prefix) // 2)
    moved = {i: -best[i][1] for i in ranked[:r]}
    stayed = ranked[r:] if prefix == 0 else sorted(ranked[r:])
    return [*range(prefix), *stayed, *odd], moved


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(2, 31), prefix=st.integers(0, 5), r=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_matching_equals_the_loop(tokens: int, prefix: int, r: int, seed: int) -> None:
    tokens += prefix
    metric, x = rand(3, tokens, 8, seed=seed), rand(3, tokens, 5, seed=seed + 1)
    weight = rand(3, tokens, seed=seed + 2).abs() + 0.5
    join = bipartite_soft_matching(metric, r, prefix, weight)
    out, sizes = join.apply(x), join.sizes()
    for sample in range(3):
        order, moved = slow_matching(metric[sample], r, prefix)
        assert join.anchor[sample].tolist() == order
        for slot, position in enumerate(order):
            members = [position, *(i for i, partner in moved.items() if partner == position)]
            total = weight[sample, members].sum()
            assert_close(sizes[sample, slot], total)
            mean = (weight[sample, members, None] * x[sample, members]).sum(0) / total
            assert_close(out[sample, slot], mean, rtol=1e-4, atol=1e-5)
            assert join.assignment[sample, members].tolist() == [slot] * len(members)
            if len(members) == 1:
                assert torch.equal(out[sample, slot], x[sample, position])


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(3, 24), k=st.integers(2, 6), seed=st.integers(0, 2**20))
def test_kth_matching_equals_the_loop(tokens: int, k: int, seed: int) -> None:
    k = min(k, tokens)
    metric = rand(2, tokens, 6, seed=seed)
    join = kth_matching(metric, k)
    kept = list(range(k - 1, tokens, k))
    assert len(kept) == tokens // k
    for sample in range(2):
        feature = normalize(metric[sample], dim=-1)
        for position in range(tokens):
            if position in kept:
                expected = kept.index(position)
            elif position < len(kept) * k:
                expected = int((feature[kept] @ feature[position]).argmax())
            else:
                expected = -1
            assert join.assignment[sample, position] == expected


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(2, 24), r=st.integers(0, 23), seed=st.integers(0, 2**20))
def test_random_matching_joins_the_nearest_survivor(tokens: int, r: int, seed: int) -> None:
    r = min(r, tokens - 1)
    metric = rand(2, tokens, 6, seed=seed)
    join = random_matching(metric, r, generator=torch.Generator().manual_seed(seed))
    again = random_matching(metric, r, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(join.assignment, again.assignment)
    for sample in range(2):
        kept, moved = join.anchor[sample].tolist(), join.moved[sample].tolist()
        assert sorted([*kept, *moved]) == list(range(tokens))
        feature = normalize(metric[sample], dim=-1)
        for position, slot in zip(moved, join.target[sample].tolist(), strict=True):
            assert slot == int((feature[kept] @ feature[position]).argmax())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(4, 20),
    r=st.integers(1, 8),
    normalise=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_join_is_the_merge_of_its_assignment(tokens: int, r: int, normalise: bool, seed: int) -> None:
    """The cheap form and the general one agree, values and gradients."""
    x = rand(2, tokens, 3, seed=seed).requires_grad_()
    weight = (rand(2, tokens, seed=seed + 1).abs() + 0.1).requires_grad_()
    found = bipartite_soft_matching(x, r, 1)
    join = Join(found.anchor, found.moved, found.target, tokens, weight, normalise)
    merge = Merge(join.assignment, weight, join.anchor, normalise)
    assert_close(join.apply(x), merge.apply(x), rtol=1e-4, atol=1e-5)
    assert_close(join.sizes(), merge.sizes(), rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(join.apply(x).square().sum(), (x, weight))
    theirs = torch.autograd.grad(merge.apply(x).square().sum(), (x, weight))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_half_precision_matches_like_float32_and_sums_in_float32() -> None:
    metric = rand(2, 40, 16, seed=3).bfloat16()
    half, full = bipartite_soft_matching(metric, 9, 1), bipartite_soft_matching(metric.float(), 9, 1)
    assert torch.equal(half.assignment, full.assignment)
    # 300 tokens of 1 joining one: summing in bfloat16 would stop at 256.
    many = 301
    moved = torch.arange(1, many).unsqueeze(0)
    join = Join(torch.zeros(1, 1, dtype=torch.long), moved, torch.zeros_like(moved), many, None, False)
    total = join.apply(torch.ones(1, many, 1, dtype=torch.bfloat16))
    assert total.dtype == torch.bfloat16
    assert float(total) > 299


def test_padding_matches_nothing() -> None:
    metric = rand(1, 12, 8, seed=5)
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[0, 8:] = False
    join = bipartite_soft_matching(metric, 3, 1, valid=valid)
    assert int(join.moved.max()) < 8
    assert int(join.anchor[0, join.target[0]].max()) < 8


def test_at_most_half_of_the_free_tokens_go() -> None:
    assert [merges(7), merges(7, 1), merges(7, 2), merges(6, 5), merges(3, 5)] == [3, 3, 2, 0, 0]
    with pytest.raises(ValueError, match="nothing to merge"):
        bipartite_soft_matching(rand(1, 6, 4, seed=0), 3, prefix=5)
    for refused in (1, 6):
        with pytest.raises(ValueError, match="k must be"):
            kth_matching(rand(1, 5, 4, seed=0), refused)
    with pytest.raises(ValueError, match="r must be"):
        random_matching(rand(1, 5, 4, seed=0), 5)


def test_schedule() -> None:
    assert merge_schedule(4, 5) == [5, 5, 5, 5]
    assert merge_schedule(4, 6, -1.0) == [12, 8, 4, 0]
    assert merge_schedule(4, 6, 1.0) == [0, 4, 8, 12]
    assert merge_schedule(1, 6, 1.0) == [6]
    assert merge_schedule(4, (3, 2)) == [3, 2, 0, 0]
    with pytest.raises(BadParameter, match="at most 2"):
        merge_schedule(2, (1, 2, 3))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["keep", "pad", "join", "sum", "matrix"]), max_size=4),
    seed=st.integers(0, 999),
)
def test_trace_is_the_product_of_the_steps(steps: list[str], seed: int) -> None:
    """Sources equal a chain of explicit matrices, whatever is mixed."""
    tokens = length = 14
    trace = Trace(2, tokens, torch.device("cpu"))
    expected = torch.eye(tokens).expand(2, -1, -1)
    for number, step in enumerate(steps):
        metric = rand(2, length, 6, seed=seed + number)
        matrix = torch.zeros(2, length, length)
        if step in ("keep", "pad"):
            index = metric[..., 0].argsort(1)[:, : max(1, length - 2)]
            valid = torch.ones_like(index, dtype=torch.bool)
            if step == "pad":
                valid[1, -1] = False
            reduction: Keep | Join | Merge | Transform = Keep(index, valid if step == "pad" else None)
            rows = torch.zeros(2, index.shape[1], length).scatter(2, index.unsqueeze(2), 1.0)
            matrix = rows * valid.unsqueeze(2)
        elif step == "matrix":
            matrix = metric[:, : max(1, length - 1), :1].abs() * torch.ones(length)
            reduction = Transform(matrix, torch.arange(matrix.shape[1]).expand(2, -1))
        elif merges(length, 1):
            join = bipartite_soft_matching(metric, 2, 1)
            reduction = join
            if step == "sum":
                reduction = Merge(join.assignment, torch.rand(2, length), join.anchor, normalise=False)
            slots = torch.arange(join.length).unsqueeze(1)
            matrix = (join.assignment.unsqueeze(1) == slots).float()
        else:
            continue
        assert_close(share(reduction, torch.ones(2, length))[0], matrix[0].sum(-1))
        trace.add(reduction)
        length = reduction.length
        expected = matrix @ expected
    assert trace.length == length
    assert_close(trace.sources(), expected, rtol=1e-4, atol=1e-5)
    y = rand(2, length, 3, seed=seed)
    share_back = expected.transpose(1, 2) / expected.sum(1).clamp(min=1e-30).unsqueeze(-1)
    assert_close(trace.spread(y), share_back @ y, rtol=1e-3, atol=1e-4)


def test_spread_gives_zeros_to_dropped_tokens() -> None:
    y = torch.tensor([[[1.0], [2.0]]])
    assert spread(y, torch.tensor([[1, -1, 0]])).flatten().tolist() == [2, 0, 1]
