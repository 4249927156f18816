"""The loop against plain ``model.generate``: greedy output must be the same, whatever the drafter proposes."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from decoders import EOS, PAD, VOCABULARY, Fixed, Oracle, build, left_padded, plain, plug, prompts
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from zoo.engines.decoding import Step
from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.engines.trees import DETACHED, ancestors
from zoo.errors import BadInput, Refused
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer

NEW = 40


def oracle(
    loaded: LoadedModel, ids: torch.Tensor, right: float = 0.7, *, tree: bool, **options: Any
) -> Oracle:
    """A drafter that knows what plain decoding will say."""
    mask = options.get("attention_mask")
    truth = plain(loaded, ids, **{"max_new_tokens": NEW} | options).tolist()
    if mask is not None:
        skip = (mask == 0).sum(1).tolist()
        truth = [row[start:] for row, start in zip(truth, skip, strict=True)]
    return Oracle(truth, right, tree=tree)


def assert_equal_up_to_a_tie(loaded: LoadedModel, out: torch.Tensor, expected: torch.Tensor) -> None:
    """Where the two part, the target itself must be undecided to within a few units in the last place."""
    apart = (out != expected)[0].nonzero()
    if not len(apart):
        return
    place = int(apart[0])
    logits = loaded.model(input_ids=expected[:, :place]).logits[0, -1].detach().float()
    gap = logits[expected[0, place]] - logits[out[0, place]]
    assert abs(float(gap)) <= 4 * torch.finfo(loaded.dtype).eps * float(logits.abs().max())


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_greedy_output_is_that_of_generate(kind: str, dtype: torch.dtype, tree: bool) -> None:
    loaded = build(kind, dtype)
    ids = prompts()
    expected = plain(loaded, ids, max_new_tokens=NEW)
    applied = plug(loaded, oracle(loaded, ids, tree=tree))
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
    if dtype == torch.float32:
        assert torch.equal(out, expected)
    else:
        assert_equal_up_to_a_tie(loaded, out, expected)
    stats = applied.report.decoding
    assert stats is not None
    assert sum(stats.committed) + 1 == NEW
    assert sum(stats.accepted) > 5, "the drafter is right often enough to exercise acceptance"
    assert sum(stats.accepted) < sum(stats.drafted)


def test_a_random_tree_leaves_gaps_to_compact() -> None:
    """The tree test is worth something: accepted nodes are not simply the first ones."""
    loaded = build()
    ids = prompts()
    seen: list[list[int]] = []

    class Watching(Oracle):
        def observe(self, row: Row, verified: Verified) -> None:
            seen.append(verified.path)

    truth = plain(loaded, ids, max_new_tokens=NEW).tolist()
    plug(loaded, Watching(truth, 0.7, tree=True)).generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
    assert sum(path != list(range(len(path))) for path in seen) >= 3


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.9])
def test_a_padded_batch_gives_what_single_prompts_give(right: float, tree: bool) -> None:
    loaded = build()
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((5, 17, 11))]
    ids, mask = left_padded(rows)
    applied = plug(loaded, oracle(loaded, ids, right, tree=tree, attention_mask=mask))
    out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(out, plain(loaded, ids, attention_mask=mask, max_new_tokens=NEW))
    for row, line in zip(rows, out, strict=True):
        assert torch.equal(line[ids.shape[1] :], plain(loaded, row[None], max_new_tokens=NEW)[0, len(row) :])


def test_samples_that_stop_early_are_padded() -> None:
    loaded = build()
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((5, 17, 11))]
    ids, mask = left_padded(rows)
    free = plain(loaded, ids, attention_mask=mask, max_new_tokens=NEW)
    eos = int(free[0, ids.shape[1] + 9])
    options = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": eos}
    expected = plain(loaded, ids, **options)
    assert (expected[:, -1] == PAD).any()
    for right, tree in ((0.0, False), (0.9, False), (0.9, True)):
        applied = plug(loaded, oracle(loaded, ids, right, tree=tree, **options))
        assert torch.equal(applied.generate(input_ids=ids, do_sample=False, **options), expected)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_dead_columns_of_a_batch_are_squeezed_out(tree: bool) -> None:
    """Now one sample accepts much, now another: the cache must not keep all the columns that the others skip."""
    loaded = build()
    ids = prompts(6)
    new = 150
    truth = plain(loaded, ids, max_new_tokens=new).tolist()
    lengths: list[int] = []
    chance = random.Random(0)

    def say(context: Context, row: Row) -> Draft:
        lengths.append(context.cache.get_seq_length() - row.prompt)
        after = truth[row.index][len(row.tokens) :][:10]
        guess = after if chance.random() < 1 / 6 else [(token + 1) % VOCABULARY for token in after]
        # As a tree: the chain behind a wrong sibling of its first node.
        return Draft([1, *guess], [-1, -1, *range(1, len(guess))]) if tree and guess else Draft(guess)

    applied = plug(loaded, Fixed(say, tree=tree))
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=new)
    assert out.tolist() == truth
    assert any(after < before for before, after in pairwise(lengths)), "it was squeezed"
    assert max(lengths) < 2 * new + 64 + 11


@pytest.mark.parametrize("tree", [False, True])
def test_left_padding_of_a_single_prompt(tree: bool) -> None:
    loaded = build()
    ids, mask = left_padded([prompts(1, 6)[0], prompts(1, 12)[0]])
    options = {"attention_mask": mask[:1], "max_new_tokens": NEW}
    applied = plug(loaded, oracle(loaded, ids[:1], tree=tree, **options))
    out = applied.generate(input_ids=ids[:1], do_sample=False, **options)
    assert torch.equal(out, plain(loaded, ids[:1], **options))


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("place", range(4, 12))
def test_end_of_sequence_inside_a_draft(place: int, tree: bool) -> None:
    loaded = build()
    ids = prompts()
    eos = int(plain(loaded, ids, max_new_tokens=NEW)[0, ids.shape[1] + place])
    expected = plain(loaded, ids, max_new_tokens=NEW, eos_token_id=[eos, 999])
    # The drafter goes on behind the end, as it would without it.
    applied = plug(loaded, oracle(loaded, ids, 1.0, tree=tree))
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW, eos_token_id=[eos, 999])
    assert torch.equal(out, expected)
    assert int(out[0, -1]) == eos


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("new", [1, 2, 3, 7, 11])
def test_length_reached_inside_a_draft(new: int, tree: bool) -> None:
    loaded = build()
    ids = prompts()
    applied = plug(loaded, oracle(loaded, ids, 1.0, tree=tree))
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=new)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=new))
    assert out.shape[1] == ids.shape[1] + new


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": 7},
        {"suppress_tokens": [5, 9, 11]},
        {"bad_words_ids": [[4, 5], [8]]},
        {"forced_eos_token_id": EOS},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("tree", [False, True])
def test_logits_processors_are_honoured(options: dict[str, Any], tree: bool) -> None:
    loaded = build()
    ids = prompts()
    options = {"max_new_tokens": 25} | options
    applied = plug(loaded, oracle(loaded, ids, tree=tree, **options))
    assert torch.equal(
        applied.generate(input_ids=ids, do_sample=False, **options), plain(loaded, ids, **options)
    )


class Shift(LogitsProcessor):
    """A processor of the user's: it forbids the successor of the last token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, (input_ids[:, -1:] + 1) % VOCABULARY, float("-inf"))


def test_a_processor_of_the_user_in_a_padded_batch() -> None:
    loaded = build()
    ids, mask = left_padded([prompts(1, 6)[0], prompts(1, 12, 3)[0]])
    options = {
        "attention_mask": mask,
        "max_new_tokens": 25,
        "logits_processor": LogitsProcessorList([Shift()]),
    }
    applied = plug(loaded, oracle(loaded, ids, tree=False, **options))
    assert torch.equal(
        applied.generate(input_ids=ids, do_sample=False, **options), plain(loaded, ids, **options)
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_stop_strings(batch: int) -> None:
    loaded = build(vocab_size=300, initializer_range=0.6)
    tokenizer = byte_tokenizer()
    loaded.processor = tokenizer
    ids = torch.randint(40, 120, (batch, 12), generator=torch.Generator().manual_seed(3))
    free = plain(loaded, ids, max_new_tokens=NEW)
    string = tokenizer.decode(free[0, ids.shape[1] + 10 : ids.shape[1] + 12])
    options = {"max_new_tokens": NEW, "stop_strings": [string]}
    expected = plain(loaded, ids, tokenizer=tokenizer, eos_token_id=299, **options)
    assert expected.shape[1] < free.shape[1] or batch > 1
    applied = plug(loaded, oracle(loaded, ids, 1.0, tree=False))
    out = applied.generate(input_ids=ids, do_sample=False, eos_token_id=299, **options)
    assert torch.equal(out, expected)
    loaded.processor = None
    with pytest.raises(BadInput, match="tokenizer"):
        applied.generate(input_ids=ids, **options)


class Listening(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.heard += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_what_it_hears_under_generate(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = build(vocab_size=300)
    ids = prompts()
    there, here = Listening(), Listening()
    plain(loaded, ids, max_new_tokens=NEW, streamer=there)
    applied = plug(loaded, oracle(loaded, ids, tree=False))
    applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW, streamer=here)
    assert here.heard == there.heard
    assert here.ended
    tokenizer = byte_tokenizer()
    plain(loaded, ids, max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = capsys.readouterr().out
    applied.generate(
        input_ids=ids, do_sample=False, max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    assert capsys.readouterr().out == expected


def test_steps_are_reported_as_they_happen() -> None:
    loaded = build()
    ids = prompts()
    steps: list[Step] = []
    applied = plug(loaded, oracle(loaded, ids, tree=False), steps.append)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
    assert [token for step in steps for token in step.tokens] == out[0, ids.shape[1] :].tolist()
    assert steps == applied.trace
    stats = applied.report.decoding
    assert stats is not None
    assert stats.steps == len(steps) - 1  # the first token comes from the prompt's own pass
    assert [step.accepted for step in steps[1:]] == stats.accepted
    assert [len(step.tokens) for step in steps[1:]] == stats.committed
    assert applied.report.kept == len(steps)
    assert applied.report.total == NEW
    assert 0 <= stats.overhead_seconds <= stats.total_seconds


def test_drafts_end_with_the_models_positions() -> None:
    """Behind the last position drafting stops; plain steps go on, as they do under generate."""
    loaded = build(max_position_embeddings=30)
    ids = prompts(1, 14)
    passes: list[torch.Tensor] = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(kwargs["position_ids"][0])

    drafter = oracle(loaded, ids, 0.6, tree=False, max_new_tokens=40)
    handle = loaded.model.register_forward_pre_hook(watch, with_kwargs=True)
    out = plug(loaded, drafter).generate(input_ids=ids, do_sample=False, max_new_tokens=40)
    handle.remove()
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=40))
    drafted = [int(positions.max()) for positions in passes[1:] if len(positions) > 1]
    assert max(drafted) == 29
    assert int(passes[-1].max()) == 14 + 40 - 2


def test_a_prompt_longer_than_the_sliding_window() -> None:
    loaded = build("sliding")
    ids = prompts(1, 20)
    expected = plain(loaded, ids, max_new_tokens=NEW)
    applied = plug(loaded, oracle(loaded, ids, tree=False))
    assert torch.equal(applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW), expected)
    with pytest.raises(Refused, match="sliding-window"):
        plug(loaded, oracle(loaded, ids, tree=True)).generate(input_ids=ids, max_new_tokens=NEW)
    with pytest.raises(Refused, match="sliding-window"):
        applied.generate(input_ids=prompts(2), max_new_tokens=NEW)


def test_embeddings_instead_of_ids() -> None:
    loaded = build()
    embeds = loaded.model.get_input_embeddings()(prompts())
    expected = loaded.model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=NEW)
    applied = plug(loaded, Oracle(expected.tolist(), 0.8, tree=False))
    out = applied.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(out, expected)
    assert applied.report.decoding is not None
    assert sum(applied.report.decoding.accepted) > 5


@pytest.mark.parametrize("tree", [False, True])
def test_the_returned_cache_goes_on_where_generation_stopped(tree: bool) -> None:
    loaded = build()
    ids = prompts()
    applied = plug(loaded, oracle(loaded, ids, tree=tree))
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=21, return_dict_in_generate=True)
    expected = loaded.model.generate(
        input_ids=ids, do_sample=False, max_new_tokens=21, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"use_cache": False}, "dynamic cache"),
        ({"cache_implementation": "static"}, "dynamic cache"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"custom_generate": "someone/else"}, "custom_generate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    loaded = build()
    with pytest.raises(Refused, match=says) as refusal:
        plug(loaded, Drafter()).generate(input_ids=prompts(), max_new_tokens=4, **options)
    assert "\n" not in str(refusal.value)


def test_a_filled_cache_is_refused() -> None:
    loaded = build()
    cache = loaded.model(input_ids=prompts(), use_cache=True).past_key_values
    with pytest.raises(Refused, match="past_key_values"):
        plug(loaded, Drafter()).generate(input_ids=prompts(1, 20), past_key_values=cache, max_new_tokens=4)


def test_streamed_batches_are_refused() -> None:
    loaded = build()
    with pytest.raises(Refused, match="batch size 1"):
        plug(loaded, Drafter()).generate(input_ids=prompts(2), max_new_tokens=4, streamer=Listening())


def test_an_empty_draft_costs_no_other_computation() -> None:
    """The very inputs of plain generation go through the model, so the logits are equal to the bit."""
    loaded = build()
    ids = prompts()
    calls: list[list[torch.Tensor]] = [[], []]

    def keep(side: int) -> Any:
        return lambda module, args, output: calls[side].append(output.logits[:, -1].clone())

    for side, generate in enumerate((loaded.model.generate, plug(loaded, Drafter()).generate)):
        handle = loaded.model.register_forward_hook(keep(side))
        generate(input_ids=ids, do_sample=False, max_new_tokens=12)
        handle.remove()
    assert len(calls[0]) == len(calls[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*calls, strict=True))


class Asking(Drafter):
    needs = frozenset({"logits", "prompt-logits", "hidden-states"})

    def __init__(self, truth: list[list[int]], head: torch.nn.Module) -> None:
        self.truth = truth
        self.head = head
        self.seen: list[tuple[int, Verified]] = []

    def propose_row(self, row: Row) -> Draft:
        return Draft([*self.truth[row.index][len(row.tokens) :][: 1 + row.index], 5, 6])

    def observe(self, row: Row, verified: Verified) -> None:
        assert verified.logits is not None
        assert verified.hidden_states is not None
        assert len(verified.logits) == len(verified.tokens) == len(verified.hidden_states[-1])
        # transformers puts the final norm into the last of the hidden states
        torch.testing.assert_close(self.head(verified.hidden_states[-1]), verified.logits)
        self.seen.append((row.index, verified))
        choices = verified.logits.argmax(-1).tolist()
        if verified.prefill:
            assert verified.tokens == row.tokens[: row.prompt]
            assert choices[-1] == verified.committed[0]
        else:
            place = row.tokens[: len(row.tokens) - len(verified.committed)]
            assert verified.tokens[0] == place[-1]
            assert (
                verified.committed
                == [*(verified.tokens[node + 1] for node in verified.path), choices[len(verified.path)]][
                    : len(verified.committed)
                ]
            )


def test_drafters_see_what_they_ask_for() -> None:
    loaded = build()
    ids, mask = left_padded([prompts(1, 6)[0], prompts(1, 12, 3)[0]])
    options = {"attention_mask": mask, "max_new_tokens": 20}
    truth = oracle(loaded, ids, tree=False, **options).truth
    drafter = Asking([list(row) for row in truth], loaded.model.lm_head)
    out = plug(loaded, drafter).generate(input_ids=ids, do_sample=False, **options)
    assert torch.equal(out, plain(loaded, ids, **options))
    assert [row for row, verified in drafter.seen if verified.prefill] == [0, 1]
    assert all(any(verified.path for index, verified in drafter.seen if index == row) for row in (0, 1))


def test_nodes_that_ride_along_disturb_nobody() -> None:
    """A window beside the candidates, with a mask and positions of its own, as lookahead decoding has."""
    loaded = build()
    ids = prompts()
    truth = plain(loaded, ids, max_new_tokens=NEW)[0].tolist()

    def say(context: Context, row: Row) -> Draft:
        guesses = truth[len(row.tokens) :][:3]
        parents = [DETACHED, 0, *(-1 if node == 0 else node + 1 for node in range(len(guesses)))]
        parents[1] = DETACHED
        seen = ancestors(parents)
        seen[2, 1] = True  # the second of the window sees the first
        deep = [1, 2, *range(1, len(guesses) + 1)]
        return Draft([9, 9, *guesses], parents, seen=seen, depths=deep)

    applied = plug(loaded, Fixed(say, tree=True))
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
    assert out[0].tolist() == truth
    assert max(step.accepted for step in applied.trace) == 3


def test_a_drafter_that_fails_leaves_nothing_behind() -> None:
    loaded = build()
    ids = prompts()
    before = {name: set(vars(module)) for name, module in loaded.model.named_modules()}

    class Failing(Oracle):
        def propose_row(self, row: Row) -> Draft:
            raise RuntimeError("no more drafts")

    drafter = Failing([], 0.5, tree=False)
    with plug(loaded, drafter) as applied:
        with pytest.raises(RuntimeError, match="no more drafts"):
            applied.generate(input_ids=ids, max_new_tokens=NEW)
        assert drafter.stopped == 1
    assert drafter.closed == 1
    assert {name: set(vars(module)) for name, module in loaded.model.named_modules()} == before


def test_a_tree_must_be_declared() -> None:
    loaded = build()
    drafter = Fixed(lambda context, row: Draft([5, 6], [-1, -1]))
    with pytest.raises(ValueError, match="does not declare"):
        plug(loaded, drafter).generate(input_ids=prompts(), max_new_tokens=6)


def test_nothing_to_report_before_the_first_run() -> None:
    with pytest.raises(BadInput, match="call generate first"):
        _ = plug(build(), Drafter()).report


def test_encoders_are_refused() -> None:
    from transformers import ViTConfig, ViTModel

    vit = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(Refused, match="language-model head"):
        plug(LoadedModel(vit), Drafter())
