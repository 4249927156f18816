"""Zero-TPrune: PageRank on attention, and what leaves, against literal loops on eager attention."""

from __future__ import annotations

import math

import pytest
import torch
from encoders import features, pixels, tiny
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

import zoo
from zoo.engines.attention_graph import page_rank, without
from zoo.errors import BadParameter, Refused
from zoo.methods.encoder_tokens.zero_tprune import duplicates, importance


def maps(batch: int, heads: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, heads, tokens, tokens, generator=generator)).softmax(-1)


def slow_rank(attention: torch.Tensor, steps: int) -> list[float]:
    tokens = len(attention)
    rank = [1 / tokens] * tokens
    for _ in range(steps):
        rank = [sum(float(attention[i, j]) * rank[i] for i in range(tokens)) for j in range(tokens)]
    return rank


def slow_importance(attention: torch.Tensor, steps: int, low: float, high: float) -> list[float]:
    ranks = [slow_rank(head, steps) for head in attention]
    used = []
    for rank in ranks:
        scaled = [value / max(rank) for value in rank]
        mean = sum(scaled) / len(scaled)
        if low <= sum((value - mean) ** 2 for value in scaled) / len(scaled) <= high:
            used.append(rank)
    used = used or ranks
    return [math.sqrt(sum(rank[j] ** 2 for rank in used) / len(used)) for j in range(len(ranks[0]))]


def test_mass_stays_one_and_one_step_is_the_column_mean() -> None:
    attention = maps(2, 3, 11)
    assert_close(page_rank(attention, 30).sum(-1), torch.ones(2, 3))
    assert_close(page_rank(attention, 1), attention.mean(2))


def test_permuting_tokens_permutes_scores() -> None:
    attention = maps(1, 2, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved = attention[:, :, order][..., order]
    assert_close(
        importance(moved, 5, (0.01, 0.7)),
        importance(attention, 5, (0.01, 0.7))[:, order],
        rtol=1e-4,
        atol=1e-6,
    )


def test_padding_passes_nothing_on() -> None:
    """A graph with padding ranks like the graph without it."""
    attention = maps(1, 2, 8)
    attention[..., 6:] = 0
    attention = attention / attention.sum(-1, keepdim=True)
    valid = torch.arange(8).unsqueeze(0) < 6
    expected = page_rank(attention[:, :, :6, :6], 4)
    assert_close(page_rank(attention, 4, valid)[..., :6], expected)
    assert importance(attention, 4, (0, 1), valid)[0, 6:].tolist() == [-1, -1]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.02, 0.05), (0.9, 1.0)])
def test_importance_equals_the_loop(low: float, high: float) -> None:
    """All heads, some of them, and none of them inside the range (then all count)."""
    attention = maps(2, 4, 7, seed=3)
    found = importance(attention, 3, (low, high))
    for sample in range(2):
        expected = torch.tensor(slow_importance(attention[sample], 3, low, high))
        assert_close(found[sample], expected, rtol=1e-4, atol=1e-6)


def test_a_copy_of_an_important_patch_leaves() -> None:
    key = torch.eye(6).unsqueeze(0).clone()
    key[0, 4] = 5 * key[0, 1]
    score = torch.tensor([[0.6, 0.9, 0.7, 0.1, 0.2, 0.3]])
    assert duplicates(key, score, 1).tolist() == [[4]]


def test_the_rest_of_a_graph_sums_to_one() -> None:
    survivors = torch.tensor([[0, 2, 5], [1, 2, 3]])
    attention = maps(2, 2, 6)
    rest = without(attention, survivors)
    expected = attention[1][:, survivors[1]][..., survivors[1]]
    assert_close(rest[1], expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov2-registers"])
def test_what_stays_equals_the_loop_on_eager_attention(kind: str) -> None:
    loaded = tiny(kind)
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    method = zoo.method("zero-tprune", layers=(1,), retention=(0.6,), iterations=(4,), duplicates=5)
    keys: list[torch.Tensor] = []
    attention = encoder.blocks[1].attention
    hook = attention.key.linear.register_forward_hook(lambda *args: keys.append(args[2].detach()))
    with method.apply(loaded) as applied:
        features(loaded.model, pixels())
    hook.remove()
    with torch.no_grad():
        eager = tiny(kind, attention="eager").model(pixels(), output_attentions=True).attentions[1]
    prefix, kept = encoder.prefix, applied.sources.argmax(-1)
    for sample in range(2):
        key = keys[0][sample].unflatten(-1, (attention.heads, -1)).mean(1)
        patches = list(range(prefix, len(key)))
        score = slow_importance(eager[sample], 4, 0.01, 0.7)
        ranked = sorted(patches, key=lambda i: score[i])
        low, high = ranked[: len(patches) // 2], ranked[len(patches) // 2 :]
        like = {i: max(float(cosine_similarity(key[i], key[j], dim=0)) for j in high) for i in low}
        gone = sorted(low, key=lambda i: -like[i])[:5]
        left = [i for i in range(len(key)) if i not in gone]
        rest = eager[sample][:, left][..., left]
        score = slow_importance(rest / rest.sum(-1, keepdim=True), 4, 0.01, 0.7)
        free = sorted(range(prefix, len(left)), key=lambda i: -score[i])[
            : math.ceil(0.6 * (len(left) - prefix))
        ]
        assert kept[sample].tolist() == [*range(prefix), *sorted(left[i] for i in free)]


def test_refusals() -> None:
    with pytest.raises(Refused, match="only 4 blocks"):
        zoo.method("zero-tprune").apply(tiny("vit"))
    for wrong in (
        {"layers": (1, 1, 2, 3, 4)},
        {"layers": (1, 2)},
        {"iterations": (1, 1)},
        {"variance": (0.5, 0.1)},
        {"retention": (1, 1, 1, 1, 0)},
    ):
        with pytest.raises(BadParameter):
            zoo.method("zero-tprune", **wrong)
