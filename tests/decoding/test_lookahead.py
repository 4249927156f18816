"""Window, pool and guesses of lookahead decoding, against a loop that runs the window by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import PAD, build, left_padded, plain, prompts
from test_speculative_sampling import SMALL, chi_square, ids_of_small, pair_law

import zoo
from zoo.engines.trees import ancestors
from zoo.errors import BadParameter, Refused
from zoo.families.decoding import AppliedDecoder
from zoo.methods.decoding._lookahead_window import NgramPool, Window, merged
from zoo.models import LoadedModel

SHAPES = [(3, 2), (3, 5), (4, 5), (5, 7)]


def apply(loaded: LoadedModel, ngram: int = 4, window: int = 5, **options: Any) -> AppliedDecoder:
    return zoo.method("lookahead", ngram=ngram, window=window, **options).apply(loaded)


@pytest.mark.parametrize(("ngram", "window"), SHAPES)
@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_greedy_output_is_that_of_generate(kind: str, ngram: int, window: int) -> None:
    loaded = build(kind=kind, initializer_range=0.05)
    applied = apply(loaded, ngram, window)
    for seed in (1, 2):
        ids = prompts(1, 14, seed)
        out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=60)
        assert torch.equal(out, plain(loaded, ids, max_new_tokens=60))
        stats = applied.report.decoding
        assert stats is not None
        assert sum(stats.accepted) > 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("from_prompt", [False, True])
def test_the_output_does_not_depend_on_the_guesses(seed: int, from_prompt: bool) -> None:
    loaded = build()
    applied = apply(loaded, seed=seed, pool_from_prompt=from_prompt)
    out = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=40)
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=40))


def test_the_window_holds_jacobi_iterations() -> None:
    """Each new guess is what the model says behind the committed text, its level's first tokens and its own column."""
    loaded = build()
    applied = apply(loaded, 4, 5)
    drafter: Any = applied.drafter
    seen = []
    observe = drafter.observe

    def watch(row: Any, verified: Any) -> None:
        before = [list(level) for level in drafter.samples[0].window.levels]
        observe(row, verified)
        if verified.draft.seen is not None:
            text = row.tokens[: len(row.tokens) - len(verified.committed)]
            seen.append((text, before, [list(level) for level in drafter.samples[0].window.levels]))

    drafter.observe = watch
    applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=40)
    assert len(seen) > 15
    for text, before, after in seen:
        first = [text[-1], *before[0]]
        new = []
        for column in range(len(before[-1])):
            # The row that column j of the newest level stands for: j tokens of the first row, then down its column.
            if len(before) == 1:
                line = text + before[0][: column + 1]
            else:
                line = text[:-1] + first[: column + 1] + [level[column] for level in before[1:]]
            with torch.no_grad():
                new.append(int(loaded.model(input_ids=torch.tensor([line])).logits[0, -1].argmax()))
        assert after[-1] == (new[1:] if 1 < len(before) < 3 else new)
        assert after[0] == (before[1][1:] if len(before) == 3 else before[0][1:])


def test_a_padded_batch_gives_what_single_prompts_give() -> None:
    loaded = build(initializer_range=0.05)
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((9, 25, 14))]
    ids, mask = left_padded(rows)
    out = apply(loaded).generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=40)
    for row, line in zip(rows, out, strict=True):
        assert torch.equal(line[ids.shape[1] :], plain(loaded, row[None], max_new_tokens=40)[0, len(row) :])


@pytest.mark.parametrize("place", [2, 11, 25])
def test_end_of_sequence_inside_a_guess(place: int) -> None:
    loaded = build(initializer_range=0.05)
    options = {"max_new_tokens": 40, "pad_token_id": PAD}
    options["eos_token_id"] = int(plain(loaded, prompts(), max_new_tokens=40)[0, 14 + place])
    out = apply(loaded).generate(input_ids=prompts(), do_sample=False, **options)
    assert torch.equal(out, plain(loaded, prompts(), **options))


@pytest.mark.parametrize("new", [1, 2, 7, 9])
def test_short_generations(new: int) -> None:
    loaded = build(initializer_range=0.05)
    out = apply(loaded, pool_from_prompt=True).generate(
        input_ids=prompts(), do_sample=False, max_new_tokens=new
    )
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=new))


def test_repetition_penalty_and_bfloat16() -> None:
    loaded = build()
    options: dict[str, Any] = {"max_new_tokens": 24, "repetition_penalty": 1.3}
    out = apply(loaded).generate(input_ids=prompts(), do_sample=False, **options)
    assert torch.equal(out, plain(loaded, prompts(), **options))
    half = build(dtype=torch.bfloat16)
    assert apply(half).generate(input_ids=prompts(), do_sample=False, max_new_tokens=24).shape == (1, 38)


def test_what_is_sampled_follows_the_law() -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    applied = apply(loaded, 3, 2, pool_from_prompt=True)
    torch.manual_seed(11)
    options = {"do_sample": True, "max_new_tokens": 3, "pad_token_id": 0}
    options |= {"temperature": 0.8, "top_k": 6, "top_p": 0.9}
    samples = torch.cat([applied.generate(input_ids=ids_of_small(), **options) for _ in range(250)])
    assert chi_square(samples, law) > 1e-3


def test_the_pool_keeps_the_latest() -> None:
    pool = NgramPool(2)
    for ngram in ((1, 2), (3, 4), (1, 2), (5, 6)):
        pool.add(9, ngram)
    assert pool.after(9) == [(1, 2), (5, 6)]
    assert pool.after(8) == []


def test_a_window_that_is_not_full_has_no_ngrams() -> None:
    window = Window(3, [1, 2, 3, 4])
    assert window.ngrams(0, [5, 6, 7, 8]) == []
    window.advance([5, 6, 7, 8])
    assert window.levels == [[2, 3, 4], [5, 6, 7, 8]]
    window.advance([11, 12, 13, 14])
    assert window.levels == [[3, 4], [6, 7, 8], [12, 13, 14]]
    assert window.ngrams(2, [21, 22, 23]) == [(2, (6, 12, 21)), (3, (7, 13, 22)), (4, (8, 14, 23))]


def test_common_beginnings_are_verified_once() -> None:
    tokens, parents = merged([(1, 2, 3), (1, 2, 4), (5, 2, 3)])
    assert tokens == [1, 2, 3, 4, 5, 2, 3]
    assert parents == [-1, 0, 1, 1, -1, 4, 5]
    assert ancestors(parents)[4].tolist() == [True, True, True, False, True, False, False, False]


def test_refusals() -> None:
    with pytest.raises(Refused, match="sliding-window"):
        apply(build(kind="sliding")).generate(input_ids=prompts(), max_new_tokens=4)
    with pytest.raises(BadParameter, match="greater than or equal to 3"):
        zoo.method("lookahead", ngram=2)
