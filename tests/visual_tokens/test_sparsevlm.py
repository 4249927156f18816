"""SparseVLM against loops over scalars, and a forward pass by hand."""

from __future__ import annotations

import math

import pytest
import torch
from reference import cast, load
from staged import Rule, Sequence, best, inputs, logits_by_hand

import zoo
from zoo.engines.selection import cluster_dpc_knn
from zoo.methods.visual_tokens.sparsevlm import SparseVLM, raters


def slow_raters(image: torch.Tensor, text: torch.Tensor) -> list[int]:
    shares = [0.0] * len(text)
    for row in image:
        weights = [math.exp(float(row @ word)) for word in text]
        for number, weight in enumerate(weights):
            shares[number] += weight / sum(weights)
    return [number for number, share in enumerate(shares) if share > sum(shares) / len(shares)]


def slow_clusters(x: torch.Tensor, clusters: int) -> tuple[list[int], list[int]]:
    size = len(x)
    far = [[float((a - b).norm()) / math.sqrt(x.shape[1]) for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in far]
    largest = max(map(max, far))
    apart = [
        min([far[i][j] for j in range(size) if density[j] > density[i]], default=largest) for i in range(size)
    ]
    centres = sorted(range(size), key=lambda i: -apart[i] * density[i])[:clusters]
    member = [min(range(clusters), key=lambda c: far[i][centres[c]]) for i in range(size)]
    for number, centre in enumerate(centres):
        member[centre] = number
    return centres, member


def test_clusters_are_those_of_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, clusters in ((1, 1), (12, 3), (40, 5)):
        x = torch.randn(size, 6, generator=generator)
        centres, member = cluster_dpc_knn(x, clusters, clusters)
        assert (centres.tolist(), member.tolist()) == slow_clusters(x, clusters)


def rule(counts: list[int], memory: dict[str, list[int]], stage: int) -> Rule:
    """Drop and recycle as the paper says."""

    def reduce(now: Sequence) -> None:
        question = list(range(now.visual[-1] + 1, len(now.hidden)))
        if stage == 0:
            memory["raters"] = slow_raters(now.embeddings[now.visual], now.embeddings[question])
        rows = [question[number] for number in memory["raters"]]
        scores = now.before[:, rows].mean((0, 1))[now.visual]
        kept = best(scores, min(counts[stage], len(scores) - 1))
        rest = sorted(set(range(len(scores))) - set(kept), key=lambda number: -float(scores[number]))
        recycled = rest[: int(0.3 * len(rest)) + 1]
        clusters = len(recycled) // 10 + 1
        x = now.hidden[now.visual]
        _, member = slow_clusters(x[recycled], clusters)
        means = [
            torch.stack([x[n] for n, m in zip(recycled, member, strict=True) if m == number]).mean(0)
            for number in range(clusters)
        ]
        first = now.visual[0]
        now.hidden = torch.cat((now.hidden[:first], x[kept], torch.stack(means), now.hidden[question]))
        now.visual = list(range(first, first + len(kept) + clusters))
        now.positions = torch.arange(len(now.hidden))

    return reduce


@pytest.mark.parametrize("sample", [0, 1])
def test_equals_a_forward_pass_by_hand(sample: int) -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, sample)
    counts, memory = [20, 9], {}
    expected, left = logits_by_hand(loaded, data, {1: rule(counts, memory, 0), 3: rule(counts, memory, 1)})
    with zoo.method("sparsevlm", layers=[0, 2], counts=counts).apply(loaded) as applied, torch.no_grad():
        logits = applied(**data).logits[0, -1]
        bars = [bar.kept for bar in applied.report.bars["visual tokens"]]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert bars == [36, left[1], left[1], left[3]]


def test_the_released_tables_are_met_exactly_and_interpolated_between() -> None:
    for ratio, table in ((1 / 3, [300, 200, 110]), (128 / 576, [303, 110, 36]), (96 / 576, [238, 48, 26])):
        assert [SparseVLM(keep_ratio=ratio).count(stage, 576) for stage in range(3)] == table
    assert [SparseVLM(keep_ratio=64 / 576).count(stage, 576) for stage in range(3)] == [66, 30, 17]
    assert [SparseVLM(keep_ratio=1 / 3).count(stage, 288) for stage in range(3)] == [150, 100, 55]
    middle = [SparseVLM(keep_ratio=0.6).count(stage, 576) for stage in range(3)]
    assert all(low < count < 576 for low, count in zip((300, 200, 110), middle, strict=True))


def test_what_the_raters_look_at_stays_and_the_best_of_the_rest_is_recycled() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, scores = torch.randn(50, 8, generator=generator), torch.rand(50, generator=generator)
    planted = [3, 17, 30, 49]
    scores[planted] += 2
    scores[[5, 40]] -= 2
    assignment, anchor = SparseVLM().cluster(tokens, scores, 4)
    assert anchor[:4].tolist() == planted  # ascending
    assert assignment[planted].tolist() == [0, 1, 2, 3]
    assert assignment[[5, 40]].tolist() == [-1, -1]
    assert int((assignment >= 4).sum()) == int(0.3 * 46) + 1
    assert len(anchor) == 4 + int(14 / 10) + 1


def test_a_question_of_equal_words_has_them_all_as_raters() -> None:
    assert raters(torch.ones(3, 4), torch.ones(5, 4)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl", "tiny-smolvlm"])
def test_a_padded_batch_in_bf16_runs(name: str) -> None:
    loaded = load(name, torch.bfloat16)
    data = cast(inputs(loaded, 0, 1, 2), torch.bfloat16)
    with zoo.method("sparsevlm").apply(loaded) as applied:
        ids = applied.generate(**data, max_new_tokens=3, do_sample=False)
        report = applied.report
    assert ids.shape[1] == data["input_ids"].shape[1] + 3
    assert report.kept < report.total
