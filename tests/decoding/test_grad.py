"""The graph against sums written out, the fusion rules by hand, and generation with evidence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decoders import build, left_padded, plain, prompts

import zoo
from zoo.errors import BadInput
from zoo.families.decoding import AppliedDecoder
from zoo.methods.decoding.grad import Evidence, Grad, TokenGraph, graph_of
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the sofa and the cat", "x"]


def model(**changes: Any) -> LoadedModel:
    loaded = build(**({"vocab_size": 300} | changes))
    loaded.processor = byte_tokenizer()
    return loaded


def letters() -> list[str]:
    """Random text: most tokens of a random model have an edge then, and some of them are not negative."""
    codes = torch.randint(33, 127, (5, 500), generator=torch.Generator().manual_seed(0))
    return ["".join(map(chr, row)) for row in codes.tolist()]


def apply(loaded: LoadedModel, corpus: list[str] = TEXTS, **options: Any) -> AppliedDecoder:
    applied = zoo.method("grad", **options).apply(loaded, corpus=corpus)
    assert isinstance(applied, AppliedDecoder)
    return applied


def test_edges_are_sums_of_logits() -> None:
    loaded = model()
    texts = [loaded.tokenizer(text).input_ids for text in TEXTS]
    graph = graph_of(loaded.model, texts)
    expected = torch.zeros(300, 300)
    for ids in texts:
        for place in range(len(ids) - 1):
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([ids[: place + 1]])).logits[0, -1]
            expected[ids[place], ids[place + 1]] += max(0.0, float(logits[ids[place + 1]]))
    seen = {a: {b for ids in texts for c, b in itertools.pairwise(ids) if c == a} for a in range(300)}
    for token in range(300):
        edges = graph.after(token, torch.device("cpu"))
        assert (edges is None) == (not seen[token])
        if edges is None:
            continue
        following, weights = edges
        assert set(following.tolist()) == seen[token]
        wanted = expected[token, following] / expected[token].max().clamp(min=1e-30)
        torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-6)


def evidence(**options: Any) -> Evidence:
    """After token 7: token 0 (weight 1), token 2 (weight one half) and token 3 (weight 1 but implausible)."""
    graph = TokenGraph()
    for following, weight in ((0, 4.0), (2, 2.0), (3, 4.0)):
        logits = torch.zeros(2, 8)
        logits[0, following] = weight
        graph.add(torch.tensor([7, following]), logits)
    return Evidence(graph, Grad(**options))


SCORES = torch.tensor([[1.0, 2.0, 1.5, -9.0, -1.0, -1.0, -1.0, -1.0]])


def test_the_fusion_rules() -> None:
    p = SCORES.softmax(-1)[0]
    best = SCORES[0]
    spread = float(best.max() - best.mean())
    weights = torch.tensor([1, 0, 0.5, 0, 0, 0, 0, 0])
    doubt = 1 - float(p.max())
    entropy = float(-(p * p.log()).sum()) / torch.tensor(8.0).log().item()
    last = torch.tensor([[3, 7]])
    for options, expected in (
        ({"fusion": "scaled"}, SCORES[0] + 0.5 * doubt * spread * weights),
        ({"fusion": "additive"}, SCORES[0] + 0.5 * doubt * weights),
        ({"fusion": "interpolate"}, (1 - 0.5 * doubt) * SCORES[0] + 0.5 * doubt * 2.0 * weights),
        ({"trust": "entropy", "alpha": 1.0}, SCORES[0] + entropy * spread * weights),
        ({"alpha": 0.0}, SCORES[0]),
    ):
        before = SCORES.clone()
        torch.testing.assert_close(evidence(**options)(last, before)[0], expected)
        assert torch.equal(before, SCORES)


def test_without_an_edge_nothing_changes() -> None:
    assert torch.equal(evidence()(torch.tensor([[7, 5]]), SCORES), SCORES)


def test_tokens_that_were_forbidden_stay_so() -> None:
    scores = SCORES.clone()
    scores[0, 0] = float("-inf")
    for fusion in ("scaled", "additive", "interpolate"):
        fused = evidence(fusion=fusion, alpha=1.0, plausible=0.0)(torch.tensor([[7]]), scores)
        assert fused[0, 0] == float("-inf")
        assert not fused.isnan().any()


def test_generation_is_greedy_on_fused_scores() -> None:
    loaded = model(initializer_range=0.02)  # logits so flat that the evidence decides
    applied = apply(loaded, letters(), alpha=1.0, plausible=0.0, fusion="additive")
    ids = torch.tensor([loaded.tokenizer("the").input_ids])
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=20)
    assert not torch.equal(out, plain(loaded, ids, max_new_tokens=20))
    graph = graph_of(loaded.model, [loaded.tokenizer(text).input_ids for text in letters()])
    fuse = Evidence(graph, applied.method)
    text = ids
    for _ in range(20):
        with torch.no_grad():
            scores = fuse(text, loaded.model(input_ids=text).logits[:, -1])
        text = torch.cat((text, scores.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, text)
    assert applied.report.decoding is not None


def test_without_weight_it_is_plain_decoding() -> None:
    loaded = model()
    out = apply(loaded, alpha=0.0).generate(input_ids=prompts(), do_sample=False, max_new_tokens=20)
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=20))


def test_a_padded_batch_gives_what_single_prompts_give() -> None:
    loaded = model(initializer_range=0.05)
    applied = apply(loaded, letters(), alpha=1.0, plausible=0.0)
    rows = [torch.tensor(loaded.tokenizer(text).input_ids) for text in ("the", "a cat", "on the mat")]
    ids, mask = left_padded(rows)
    out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    for row, line in zip(rows, out, strict=True):
        alone = applied.generate(input_ids=row[None], do_sample=False, max_new_tokens=20)
        assert torch.equal(line[ids.shape[1] :], alone[0, len(row) :])


def test_logits_processors_of_the_caller_and_bfloat16() -> None:
    from transformers import SuppressTokensLogitsProcessor

    loaded = model(dtype=torch.bfloat16)
    silent = SuppressTokensLogitsProcessor(list(range(150)))
    out = apply(loaded, plausible=0.0).generate(
        input_ids=prompts(), do_sample=False, max_new_tokens=12, logits_processor=[silent]
    )
    assert (out[0, 14:] >= 150).all()


def test_needs_a_tokenizer() -> None:
    with pytest.raises(BadInput, match="no tokenizer"):
        zoo.method("grad").apply(build())
