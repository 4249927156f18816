"""Which source drafts, and that both matches move with the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import build, plain, prompts

import zoo
from zoo.engines.drafting import Draft, Row
from zoo.engines.suffixes import SuffixAutomaton
from zoo.errors import BadInput
from zoo.methods.decoding.sam_decoding import SamDrafter, corpus_automaton
from zoo.methods.decoding.token_recycling import TokenRecyclingDrafter, official_template

CORPUS = corpus_automaton([[1, 2, 3, 4, 5, 6, 7, 8, 9]], eos=0)


def propose(tokens: list[int], *, handicap: int = 0, corpus: SuffixAutomaton | None = CORPUS) -> Draft:
    drafter = SamDrafter(5, 2, handicap, corpus, None)
    row = Row(0, tokens, len(tokens))
    drafter.start(None, [row])
    return drafter.propose_row(row)


def test_the_longer_match_drafts() -> None:
    assert propose([9, 9, 1, 2, 3]).tokens == [4, 5, 6, 7]
    assert propose([20, 3, 30, 31, 32, 33, 3, 20, 3]).tokens == [30, 31, 32, 33]
    assert propose([9, 9, 1, 2, 3], handicap=2).tokens == [], "three tokens less two are no match of two"
    assert propose([9, 9, 1, 2, 3], corpus=None).tokens == []


def test_equal_matches_go_to_the_own_text() -> None:
    assert propose([2, 3, 50, 51, 52, 53, 2, 3]).tokens == [50, 51, 52, 53]


def test_the_corpus_ends_texts_with_the_end_of_sequence() -> None:
    assert CORPUS.tokens[-1] == 0
    assert corpus_automaton([[1, 0], [2]], eos=0).tokens == [1, 0, 2, 0]
    assert corpus_automaton([[1], [2]], eos=None).tokens == [1, 2]


def test_proposing_step_by_step_equals_proposing_at_once() -> None:
    tokens = torch.randint(0, 5, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    drafter = SamDrafter(8, 2, 1, CORPUS, None)
    row = Row(0, tokens[:3], 3)
    drafter.start(None, [row])
    for end in range(3, 80, 4):
        row.tokens[:] = tokens[:end]
        fresh = SamDrafter(8, 2, 1, CORPUS, None)
        fresh.start(None, [row])
        assert drafter.propose_row(row) == fresh.propose_row(row)


def test_short_matches_leave_it_to_token_recycling() -> None:
    fallback = TokenRecyclingDrafter(official_template(8), 8)
    fallback.table.harvest([6], torch.arange(40.0).unsqueeze(0))
    drafter = SamDrafter(5, 3, 0, None, fallback)
    row = Row(0, [4, 5, 6], 3)
    drafter.start(None, [row])
    assert drafter.propose_row(row).parents == official_template(8).parents
    row.tokens[:] = [7, 5, 6, 9, 7, 5, 6]
    drafter.start(None, [row])
    assert drafter.propose_row(row).tokens == [9, 7, 5], "the root itself is not in the automaton yet"


def test_chains_alone_work_with_sliding_windows() -> None:
    loaded = build("sliding", initializer_range=0.02)
    ids = prompts(1, 20)
    applied = zoo.method("sam-decoding", fallback="none", min_match=2).apply(loaded)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=60)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=60))
    assert applied.report.decoding is not None
    assert sum(applied.report.decoding.accepted) > 10


def test_a_corpus_needs_a_tokenizer() -> None:
    with pytest.raises(BadInput, match="tokenizer"):
        zoo.method("sam-decoding", corpus="news").apply(build())


def test_a_corpus_from_a_file(tmp_path: Path) -> None:
    from zoo.models.tiny import byte_tokenizer

    file = tmp_path / "corpus.txt"
    file.write_text("the old lighthouse stands at the end of the road\n", encoding="utf-8")
    loaded = build(vocab_size=300)
    loaded.processor = byte_tokenizer()
    drafter = zoo.method("sam-decoding", corpus=str(file)).apply(loaded).drafter
    assert isinstance(drafter, SamDrafter)
    assert drafter.corpus is not None
    ids = loaded.processor("see the old light", add_special_tokens=False)["input_ids"]
    row = Row(0, ids, len(ids))
    drafter.start(None, [row])
    assert loaded.processor.decode(drafter.propose_row(row).tokens).startswith("house stands")
