"""What a user asks of generation, of every method that drafts."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from decoders import PAD, build, left_padded, plain, prompts
from transformers.generation.streamers import BaseStreamer

import zoo
from zoo.engines.datastore import Datastore
from zoo.engines.verification_cost import VerificationCost
from zoo.errors import Refused
from zoo.families.decoding import AppliedDecoder
from zoo.methods.decoding._eagle_head import EagleHead
from zoo.methods.decoding._medusa_heads import MedusaHeads
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer

METHODS = (
    "prompt-lookup", "token-recycling", "sam-decoding", "rest", "goose", "speculative-sampling",
    "layer-skip-self-speculation", "medusa", "eagle", "jacobi", "lookahead",
)  # fmt: skip
EAGER: dict[str, dict[str, Any]] = {
    "prompt-lookup": {"max_ngram": 2, "draft_tokens": 5, "rule": "transformers"},
    "sam-decoding": {"min_match": 2},
    "goose": {"ngram_lengths": (2, 1)},
    "rest": {"min_match": 1},
    "speculative-sampling": {"draft_tokens": 4},
    "layer-skip-self-speculation": {"threshold": 0.0, "draft_tokens": 4},
}
"""Settings with which the short texts of these tests are drafted from."""
TEXTS = ["the cat sat on the mat and the dog sat on the sofa", "one two three one two three"]


@pytest.fixture(params=METHODS)
def slug(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(**changes: Any) -> LoadedModel:
    """A model that repeats itself, with a vocabulary of bytes."""
    loaded = build(**({"vocab_size": 300, "initializer_range": 0.05} | changes))
    loaded.processor = byte_tokenizer()
    return loaded


def resources(slug: str, loaded: LoadedModel) -> dict[str, Any]:
    """A store, a draft model that is not quite the target, or heads that expect the model to repeat itself."""
    if slug == "speculative-sampling":
        draft = LoadedModel(deepcopy(loaded.model), loaded.processor)
        weight = draft.model.lm_head.weight
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
        return {"draft": draft}
    if slug == "medusa":
        return {"heads": MedusaHeads.fresh(loaded, 3).to(loaded.dtype).eval()}
    if slug == "eagle":
        head = EagleHead.fresh(loaded)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
            # The token's half is ignored, the feature's half stays as it is.
            head.fuse.weight[:, head.fuse.out_features :].copy_(torch.eye(head.fuse.out_features))
        return {"heads": head.to(loaded.dtype).eval()}
    if slug == "rest":
        # The store holds what the model says, among other text.
        said = plain(loaded, prompts(1, 20), max_new_tokens=60)[0].tolist()
        store = Datastore.build(TEXTS, loaded.tokenizer, 16)
        tokens = torch.tensor([*said, *store.array.tokens.tolist()]).numpy()
        return {"datastore": Datastore(type(store.array).build(tokens, 16), store.tokenizer, 2)}
    return {}


def apply(slug: str, loaded: LoadedModel, **options: Any) -> AppliedDecoder:
    return zoo.method(slug, **(EAGER.get(slug, {}) | options)).apply(loaded, **resources(slug, loaded))


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_greedy_output_is_that_of_generate(slug: str, kind: str) -> None:
    loaded = model(kind=kind)
    ids = prompts(1, 20)
    applied = apply(slug, loaded)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=60)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=60))
    assert applied.report.decoding is not None
    # Jacobi's guesses are right only where a text settles at once.
    assert applied.report.decoding.tokens_per_step > (1 if slug == "jacobi" else 1.2)


def test_bfloat16(slug: str) -> None:
    loaded = model(dtype=torch.bfloat16)
    applied = apply(slug, loaded)
    out = applied.generate(input_ids=prompts(1, 20), do_sample=False, max_new_tokens=40)
    assert out.shape == (1, 60)
    # Token by token the model itself must agree, to within the rounding of its logits.
    logits = loaded.model(input_ids=out).logits[0, 19:-1].float()
    chosen = logits.gather(1, out[0, 20:, None]).squeeze(1)
    assert ((logits.max(1).values - chosen) <= 0.05 * logits.abs().max()).all()


def test_a_padded_batch_gives_what_single_prompts_give(slug: str) -> None:
    loaded = model()
    rows = [prompts(1, length, seed)[0] for length, seed in ((9, 0), (20, 1), (14, 2))]
    ids, mask = left_padded(rows)
    out = apply(slug, loaded).generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=50)
    for row, line in zip(rows, out, strict=True):
        assert torch.equal(line[ids.shape[1] :], plain(loaded, row[None], max_new_tokens=50)[0, len(row) :])


@pytest.mark.parametrize("place", [3, 17, 30])
def test_end_of_sequence_inside_a_draft(slug: str, place: int) -> None:
    loaded = model()
    ids = prompts(1, 20)
    eos = int(plain(loaded, ids, max_new_tokens=60)[0, 20 + place])
    options = {"max_new_tokens": 60, "eos_token_id": eos, "pad_token_id": PAD}
    out = apply(slug, loaded).generate(input_ids=ids, do_sample=False, **options)
    assert torch.equal(out, plain(loaded, ids, **options))


@pytest.mark.parametrize("new", [1, 2, 11, 23])
def test_length_reached_inside_a_draft(slug: str, new: int) -> None:
    loaded = model()
    ids = prompts(1, 20)
    out = apply(slug, loaded).generate(input_ids=ids, do_sample=False, max_new_tokens=new)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=new))


def test_stop_strings(slug: str) -> None:
    loaded = model(initializer_range=0.4)
    ids = torch.randint(40, 120, (1, 20), generator=torch.Generator().manual_seed(3))
    free = plain(loaded, ids, max_new_tokens=40)
    string = loaded.tokenizer.decode(free[0, 30:32])
    options = {"max_new_tokens": 40, "stop_strings": [string]}
    out = apply(slug, loaded).generate(input_ids=ids, do_sample=False, **options)
    assert torch.equal(out, plain(loaded, ids, tokenizer=loaded.tokenizer, **options))


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}, {"min_new_tokens": 9, "eos_token_id": 7}],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_are_honoured(slug: str, options: dict[str, Any]) -> None:
    loaded = model()
    ids = prompts(1, 20)
    options = options | {"max_new_tokens": 40, "pad_token_id": PAD}
    out = apply(slug, loaded).generate(input_ids=ids, do_sample=False, **options)
    assert torch.equal(out, plain(loaded, ids, **options))


class Listening(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard += value.reshape(-1).tolist()

    def end(self) -> None:
        self.heard.append(-1)


def test_streaming(slug: str) -> None:
    loaded = model()
    streamer = Listening()
    out = apply(slug, loaded).generate(
        input_ids=prompts(1, 20), do_sample=False, max_new_tokens=40, streamer=streamer
    )
    assert streamer.heard == [*out[0].tolist(), -1]


def test_one_token_prompts_and_prompts_without_a_match(slug: str) -> None:
    loaded = model(initializer_range=0.3)
    applied = apply(slug, loaded)
    for ids in (torch.tensor([[5]]), torch.arange(200, 204).unsqueeze(0)):
        out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=12)
        assert torch.equal(out, plain(loaded, ids, max_new_tokens=12))


def test_a_prompt_longer_than_the_window(slug: str) -> None:
    """Chains go on with sliding windows; trees are refused in one line, and what can be done about it said."""
    loaded = model(kind="sliding")
    ids = prompts(1, 30)
    if slug == "layer-skip-self-speculation":
        with pytest.raises(Refused, match="sliding window"):
            apply(slug, loaded)
        return
    applied = apply(slug, loaded)
    if applied.drafter.tree:
        with pytest.raises(Refused, match="sliding-window") as refusal:
            applied.generate(input_ids=ids, max_new_tokens=4)
        assert "\n" not in str(refusal.value)
        return
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=60)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=60))


def test_sampling_is_reproducible(slug: str) -> None:
    loaded = model()
    outs = []
    for seed in (0, 0, 1):
        applied = apply(slug, loaded)
        torch.manual_seed(seed)
        outs.append(applied.generate(input_ids=prompts(1, 20), do_sample=True, max_new_tokens=30))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_the_same_output_on_any_budget(slug: str) -> None:
    loaded = model()
    ids = prompts(1, 20)
    free = VerificationCost((1, 64), (64,), ((1.0, 1.0),))
    dear = VerificationCost((1, 64), (64,), ((1.0, 64.0),))
    expected = plain(loaded, ids, max_new_tokens=50)
    drafted = []
    for cost in (free, dear):
        method = apply(slug, loaded, budget="fixed")
        applied = method.method.model_copy(update={"budget": "auto"}).apply(
            loaded, cost=cost, **resources(slug, loaded)
        )
        out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=50)
        assert torch.equal(out, expected)
        drafted.append(sum(applied.report.decoding.drafted))
    assert drafted[1] < drafted[0]
