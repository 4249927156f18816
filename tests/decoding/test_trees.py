"""Trees as data: ancestors, masks, paths, and what stays in the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from zoo.engines.trees import (
    DETACHED,
    ancestors,
    children,
    depths,
    is_chain,
    keep_last,
    longest_path,
    tree_mask,
)

trees = st.integers(0, 12).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n)))).map(list)


def chain_of(parents: list[int], node: int) -> list[int]:
    """Nodes from the root to ``node``, the slow way."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@given(trees)
def test_ancestors_and_depths(parents: list[int]) -> None:
    seen = ancestors(parents)
    assert seen[0].tolist() == [True] + [False] * len(parents)
    for node in range(len(parents)):
        path = chain_of(parents, node)
        assert set(np.flatnonzero(seen[node + 1])) == {0, *(item + 1 for item in path)}
        assert depths(parents)[node] == len(path)
        assert node in children(parents)[parents[node] + 1]
    assert is_chain(parents) == (parents == list(range(-1, len(parents) - 1)))


@settings(max_examples=200)
@given(trees, st.data())
def test_longest_path_is_the_best_of_all(parents: list[int], data: st.DataObject) -> None:
    tokens = [data.draw(st.integers(0, 2)) for _ in parents]
    choices = [data.draw(st.integers(0, 2)) for _ in range(len(parents) + 1)]
    paths = [chain_of(parents, node) for node in range(len(parents))]
    right = [path for path in paths if all(tokens[item] == choices[parents[item] + 1] for item in path)]
    best = max(right, key=len, default=[])
    found = longest_path(tokens, parents, choices)
    assert len(found) == len(best)
    assert found in ([[]] if not best else right)


def test_a_detached_node_is_never_accepted() -> None:
    assert longest_path([7, 7], [DETACHED, -1], [7, 0, 0]) == [1]
    assert longest_path([7], [DETACHED], [7, 0]) == []
    assert children([DETACHED, -1]) == [[1], [], []]


def test_children_before_parents_are_refused() -> None:
    with pytest.raises(ValueError, match="parents must come before"):
        depths([1, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tree_mask(dtype: torch.dtype) -> None:
    seen = ancestors([-1, -1, 0])
    mask = tree_mask(seen, torch.tensor([False, True, True]), dtype, torch.device("cpu"))
    assert mask.shape == (1, 1, 4, 7)
    assert mask.dtype == dtype
    allowed = mask[0, 0] == 0
    assert allowed[:, :3].tolist() == [[False, True, True]] * 4
    assert np.array_equal(allowed[:, 3:].numpy(), seen)
    assert torch.equal(tree_mask(seen, 3, dtype, torch.device("cpu"))[0, 0, :, 3:], mask[0, 0, :, 3:])


def filled(lengths: list[int], batch: int = 1) -> DynamicCache:
    cache = DynamicCache()
    for layer, length in enumerate(lengths):
        states = torch.randn(batch, 2, length, 4, generator=torch.Generator().manual_seed(layer))
        cache.update(states, -states, layer)
    return cache


def test_keep_last_counts_from_the_end_of_each_layer() -> None:
    cache = filled([9, 6, 14])
    before = [layer.keys.clone() for layer in cache.layers]
    keep_last(cache, 5, torch.tensor([0, 3, 4]))
    for layer, keys in zip(cache.layers, before, strict=True):
        wanted = torch.cat((keys[..., :-5, :], keys[..., [-5, -2, -1], :]), dim=-2)
        assert torch.equal(layer.keys, wanted)
        assert torch.equal(layer.values, -wanted)


def test_keep_last_per_sample() -> None:
    cache = filled([7, 5], batch=2)
    before = [layer.keys.clone() for layer in cache.layers]
    keep_last(cache, 4, torch.tensor([[0, 1], [2, 3]]))
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[0], keys[0][:, : keys.shape[2] - 2])
        assert torch.equal(layer.keys[1], torch.cat((keys[1][:, :-4], keys[1][:, -2:]), dim=1))


def test_keep_last_skips_layers_that_hold_nothing() -> None:
    cache = DynamicCache()
    states = torch.randn(1, 2, 3, 4)
    cache.update(states, states, 1)
    keep_last(cache, 2, torch.tensor([1]))
    assert torch.equal(cache.layers[1].keys, states[..., [0, 2], :])
