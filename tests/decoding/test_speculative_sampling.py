"""The draft model: caches, schedules, vocabularies, and the law of what is sampled through the whole loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import Fixed, build, left_padded, plain, plug, prompts
from test_acceptance import p_value

import zoo
from zoo.engines import decoding, sampling
from zoo.engines.drafting import Context, Draft, Row
from zoo.errors import BadInput, Refused
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer

NEW = 40


def relative(loaded: LoadedModel, noise: float) -> LoadedModel:
    """A model that often agrees with ``loaded``: the same weights with some noise."""
    other = build(num_hidden_layers=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, theirs in zip(other.model.parameters(), loaded.model.parameters(), strict=True):
            own.copy_(theirs + noise * theirs.std() * torch.randn(theirs.shape, generator=generator))
    return other


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "confidence"])
@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
def test_greedy_output_is_that_of_generate(noise: float, schedule: str) -> None:
    loaded = build()
    draft = relative(loaded, noise)
    ids = prompts()
    method = zoo.method("speculative-sampling", schedule=schedule, confidence=0.2)
    with method.apply(loaded, draft=draft) as applied:
        out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=NEW))
    stats = applied.report.decoding
    assert stats is not None
    if noise == 0:
        assert stats.accepted == stats.drafted, "the target drafting for itself is always right"
        if schedule == "constant":
            assert stats.drafted == [5] * 6 + [2]
        if schedule == "heuristic":
            assert stats.drafted == [5, 7, 9, 11, 2]
    elif noise == 0.1:
        assert 0 < sum(stats.accepted) < sum(stats.drafted)


def test_the_drafts_are_those_of_the_draft_model() -> None:
    """After rejections and after whole acceptances its cache holds what was committed, and nothing else."""
    loaded = build()
    draft = relative(loaded, 0.1)
    ids = prompts()
    method = zoo.method("speculative-sampling", draft_tokens=4)
    applied = method.apply(loaded, draft=draft)
    proposed: list[tuple[list[int], list[int]]] = []
    inner = applied.drafter.propose_row

    def watch(row: Row) -> Draft:
        result = inner(row)
        proposed.append((list(row.tokens), result.tokens))
        return result

    applied.drafter.propose_row = watch
    applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
    assert len({step.accepted for step in applied.trace}) >= 3
    for tokens, drafted in proposed:
        fresh = plain(draft, torch.tensor([tokens]), max_new_tokens=len(drafted))[0, len(tokens) :]
        assert fresh.tolist() == drafted


def test_a_padded_batch_gives_what_single_prompts_give() -> None:
    loaded = build()
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((9, 25, 14))]
    ids, mask = left_padded(rows)
    applied = zoo.method("speculative-sampling").apply(loaded, draft=relative(loaded, 0.1))
    out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for row, line in zip(rows, out, strict=True):
        assert torch.equal(line[ids.shape[1] :], plain(loaded, row[None], max_new_tokens=NEW)[0, len(row) :])


def test_repetition_penalty_applies_to_both_models() -> None:
    loaded = build()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.5}
    applied = zoo.method("speculative-sampling").apply(loaded, draft=relative(loaded, 0.0))
    out = applied.generate(input_ids=prompts(), **options)
    assert torch.equal(out, plain(loaded, prompts(), **options))
    stats = applied.report.decoding
    assert stats is not None
    assert stats.accepted == stats.drafted


def test_confidence_ends_drafts_early() -> None:
    loaded = build()
    method = zoo.method("speculative-sampling", schedule="confidence", confidence=1.0, draft_tokens=8)
    applied = method.apply(loaded, draft=relative(loaded, 0.0))
    applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=20)
    stats = applied.report.decoding
    assert stats is not None
    assert set(stats.drafted[:-1]) == {1}


def test_a_draft_model_with_few_positions_drafts_less() -> None:
    loaded = build()
    draft = build(max_position_embeddings=24)
    applied = zoo.method("speculative-sampling").apply(loaded, draft=draft)
    out = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=NEW)
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=NEW))
    stats = applied.report.decoding
    assert stats is not None
    assert stats.drafted[0] == 5
    assert stats.drafted[-1] == 0


def test_vocabularies() -> None:
    loaded = build(vocab_size=300)
    with pytest.raises(Refused, match="target's vocabulary"):
        zoo.method("speculative-sampling").apply(loaded, draft=build(vocab_size=290))
    with pytest.raises(BadInput, match="draft_model=NAME"):
        zoo.method("speculative-sampling").apply(loaded)
    # The same tokenizer, logits padded to different widths: both ways round.
    for width in (290, 310):
        loaded.processor = byte_tokenizer()
        draft = build(vocab_size=width)
        draft.processor = byte_tokenizer()
        applied = zoo.method("speculative-sampling").apply(loaded, draft=draft)
        for sample in (False, True):
            torch.manual_seed(0)
            out = applied.generate(input_ids=prompts(), do_sample=sample, max_new_tokens=10)
            assert out.shape[1] == 24
    draft.processor.add_tokens(["one more"])
    with pytest.raises(Refused, match="target's vocabulary"):
        zoo.method("speculative-sampling").apply(loaded, draft=draft)


def test_the_draft_model_can_be_a_name() -> None:
    loaded = zoo.load_model("tiny-llama")
    applied = zoo.method("speculative-sampling", draft_model="tiny-llama").apply(loaded)
    out = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=12)
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=12))
    stats = applied.report.decoding
    assert stats is not None
    assert stats.accepted == stats.drafted


def test_ids_that_only_the_target_has_are_not_drafted_for() -> None:
    loaded = build(vocab_size=300)
    draft = build(vocab_size=290)
    loaded.processor = draft.processor = byte_tokenizer()
    ids = torch.cat((prompts(), torch.tensor([[295]])), dim=1)
    applied = zoo.method("speculative-sampling").apply(loaded, draft=draft)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=10)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=10))
    stats = applied.report.decoding
    assert stats is not None
    assert sum(stats.drafted) == 0


# --- the law of what the loop samples -------------------------------------------------------------------------

WARP = {"temperature": 0.8, "top_k": 6, "top_p": 0.9}
SMALL = {"vocab_size": 8, "initializer_range": 0.3, "pad_token_id": None, "bos_token_id": None}


def pair_law(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """Joint law ``[64]`` of the second and third generated tokens (the first speculative step), warped, exactly."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warp = LogitsProcessorList(
        [
            TemperatureLogitsWarper(WARP["temperature"]),
            TopKLogitsWarper(int(WARP["top_k"])),
            TopPLogitsWarper(WARP["top_p"]),
        ]
    )

    def following(prefixes: torch.Tensor) -> torch.Tensor:
        return warp(prefixes, loaded.model(input_ids=prefixes).logits[:, -1].float()).softmax(-1)

    with torch.no_grad():
        joint = following(ids)
        prefixes = ids
        for _ in range(2):
            prefixes = torch.cat(
                (prefixes.repeat_interleave(8, 0), torch.arange(8).repeat(len(prefixes)).unsqueeze(1)), dim=1
            )
            joint = (joint.reshape(-1, 1) * following(prefixes)).reshape(-1)
    return joint.reshape(8, 64).sum(0)


def chi_square(samples: torch.Tensor, law: torch.Tensor) -> float:
    """p-value of counts of the last two tokens ``[N, >= 2]``; impossible pairs must not occur, rare ones are pooled."""
    counts = torch.bincount(samples[:, -2] * 8 + samples[:, -1], minlength=64)
    assert not counts[law == 0].any()
    rare = law * len(samples) < 5
    pooled = torch.cat((counts[~rare], counts[rare].sum().reshape(1)))
    expected = torch.cat((law[~rare], law[rare].sum().reshape(1)))
    return p_value(pooled[expected > 0], expected[expected > 0])


def many(applied: Any, ids: torch.Tensor, draws: int) -> torch.Tensor:
    torch.manual_seed(11)
    options = {"do_sample": True, "max_new_tokens": 3, "pad_token_id": 0} | WARP
    return applied.generate(input_ids=ids, num_return_sequences=draws, **options)


def ids_of_small() -> torch.Tensor:
    return torch.tensor([[3, 1, 4, 1, 5, 2, 6]])


def copies(context: Context, row: Row) -> Draft:
    return Draft([2, 5])


def test_chosen_drafts_through_the_loop_follow_the_law() -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    samples = many(plug(loaded, Fixed(copies)), ids_of_small(), 1200)
    assert chi_square(samples, law) > 1e-3


def test_drawn_drafts_through_the_loop_follow_the_law() -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    applied = zoo.method("speculative-sampling", draft_tokens=2).apply(loaded, draft=build(seed=1, **SMALL))
    samples = many(applied, ids_of_small(), 600)
    assert chi_square(samples, law) > 1e-3
    stats = applied.report.decoding
    assert stats is not None
    assert 0 < sum(stats.accepted) < sum(stats.drafted)


def test_trees_through_the_loop_follow_the_law() -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    tree = Fixed(lambda context, row: Draft([2, 5, 6, 1, 3], [-1, -1, 0, 0, 1]), tree=True)
    applied = plug(loaded, tree)
    torch.manual_seed(11)
    options = {"do_sample": True, "max_new_tokens": 3, "pad_token_id": 0} | WARP
    samples = torch.cat([applied.generate(input_ids=ids_of_small(), **options) for _ in range(250)])
    assert chi_square(samples, law) > 1e-3


@pytest.mark.parametrize("broken", ["no residual", "too generous"])
def test_a_broken_rule_is_noticed_through_the_loop(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    if broken == "no residual":
        monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    else:
        right = sampling.accept_chain
        monkeypatch.setattr(decoding, "accept_chain", lambda p, x, u, q=None: right(p, x, u * 0.5, q))
    samples = many(plug(loaded, Fixed(copies)), ids_of_small(), 1200)
    assert chi_square(samples, law) < 1e-6
