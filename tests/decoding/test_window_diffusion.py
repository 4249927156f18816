"""Windowed denoising: plain denoising as its limit, what is run and read, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import build, prompts

import zoo
from zoo.errors import BadInput, Refused
from zoo.methods.decoding.window_diffusion import WindowDiffusion, denoise, first_masks
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

MASK = 260


def load(**changes: Any) -> LoadedModel:
    return LoadedModel(*tiny_model("tiny-llada", **changes), ref="tiny-llada")


def denoised(loaded: LoadedModel, prompt: torch.Tensor, length: int, steps: int) -> torch.Tensor:
    """Plain denoising by confidence, as LLaDA does it: the whole sequence, every time, no cache."""
    x = torch.cat((prompt, torch.full((length,), MASK)))
    for step in range(steps):
        with torch.no_grad():
            logits = loaded.model(input_ids=x.unsqueeze(0), use_cache=False, is_causal=False).logits[0]
        probabilities = logits.softmax(-1)
        logits[:, MASK] = float("-inf")
        tokens = logits.argmax(-1)
        confidence = probabilities[torch.arange(len(x)), tokens]
        confidence[x != MASK] = -1
        best = confidence.topk(length // steps + (step < length % steps)).indices
        x[best] = tokens[best]
    return x


def test_the_model_looks_both_ways() -> None:
    loaded = load()
    ids = prompts(1, 10)
    with torch.no_grad():
        before = loaded.model(input_ids=ids, is_causal=False).logits
        ids[0, -1] += 1
        after = loaded.model(input_ids=ids, is_causal=False).logits
    assert not torch.allclose(before[0, 0], after[0, 0])


@pytest.mark.parametrize("steps", [16, 8, 5])
def test_with_a_refresh_in_every_step_it_is_plain_denoising(steps: int) -> None:
    loaded = load()
    prompt = prompts(1, 9)
    applied = zoo.method("window-diffusion", refresh_cycle=1, steps=steps).apply(loaded)
    out = applied.generate(input_ids=prompt, max_new_tokens=16)
    assert torch.equal(out[0], denoised(loaded, prompt[0], 16, steps))
    assert applied.report.kept == applied.report.total == steps * 25


def test_what_runs_and_what_is_read() -> None:
    loaded = load()
    method = WindowDiffusion(window_tokens=6, active_tokens=3, refresh_cycle=4)
    widths: list[int] = []
    hook = loaded.model.model.layers[2].register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    done = list(denoise(loaded.model, method, prompts(1, 9)[0], 16, MASK))
    hook.remove()
    assert len(done) == 16
    before = torch.cat((prompts(1, 9)[0], torch.full((16,), MASK)))
    earlier: set[int] = set()
    for number, step in enumerate(done):
        masked = before == MASK
        decoded = set(((before != step.tokens).nonzero().flatten()).tolist())
        assert len(decoded) == 1
        assert widths[number] == int(step.active.sum())
        if number % 4 == 0:
            assert step.active.all()
            assert step.window.all()
            window = step.tokens != MASK
            window |= first_masks(~window, 6)
            earlier, kept = set(), set()
        else:
            assert torch.equal(step.window, window)
            wanted = set(first_masks(masked, 3).nonzero().flatten().tolist()) | earlier | kept
            assert set(step.active.nonzero().flatten().tolist()) == wanted
            kept |= decoded
        earlier = decoded
        before = step.tokens
    assert not (before == MASK).any()


def test_entries_that_are_not_run_are_those_of_the_refresh() -> None:
    """One windowed step against attention written out with the entries of the refresh for all others."""
    loaded = load(num_hidden_layers=1)
    method = WindowDiffusion(window_tokens=6, active_tokens=3, refresh_cycle=4)
    prompt = prompts(1, 9)[0]
    steps = denoise(loaded.model, method, prompt, 16, MASK)
    first, second = next(steps), next(steps)
    layer = loaded.anatomy.decoder.layers[0]
    start = torch.cat((prompt, torch.full((16,), MASK)))
    # With one layer, entries depend on a position's own token alone.
    mixed = torch.where(second.active, first.tokens, start)
    with torch.no_grad():
        hidden = loaded.model.model.embed_tokens(mixed.unsqueeze(0))
        angles = loaded.model.model.rotary_emb(hidden, torch.arange(25).unsqueeze(0))
        mask = torch.zeros(1, 1, 25, 25).masked_fill(~second.window, float("-inf"))
        part, _ = layer.attention.module(
            hidden_states=layer.input_norm(hidden), position_embeddings=angles, attention_mask=mask
        )
        hidden = hidden + part
        hidden = hidden + layer.mlp.module(layer.post_norm(hidden))
        logits = loaded.model.lm_head(loaded.model.model.norm(hidden))[0]
    logits[:, MASK] = float("-inf")
    place = int((first.tokens != second.tokens).nonzero())
    assert int(logits[place].argmax()) == second.tokens[place]


def test_a_step_never_overwrites_what_is_decoded() -> None:
    """More tokens per step than masks that ran: the rest is decoded later."""
    loaded = load()
    method = WindowDiffusion(window_tokens=4, active_tokens=2, refresh_cycle=8, steps=4)
    before = torch.cat((prompts(1, 9)[0], torch.full((16,), MASK)))
    count = 0
    for step in denoise(loaded.model, method, prompts(1, 9)[0], 16, MASK):
        assert torch.equal(before[before != MASK], step.tokens[before != MASK])
        assert not torch.equal(before, step.tokens)
        before = step.tokens
        count += 1
    assert not (before == MASK).any()
    assert count > 4


def test_sampling_bfloat16_and_padding() -> None:
    loaded = load()
    applied = zoo.method("window-diffusion", active_tokens=4, window_tokens=8, refresh_cycle=4).apply(loaded)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(applied.generate(input_ids=prompts(), do_sample=True, temperature=1.0, max_new_tokens=12))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompts()), dim=1)
    mask = (torch.arange(17) >= 3).long().unsqueeze(0)
    padded = applied.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(padded[:, 3:], applied.generate(input_ids=prompts(), max_new_tokens=12))
    loaded.model.to(torch.bfloat16)
    out = applied.generate(input_ids=prompts(), max_new_tokens=12)
    assert not (out == MASK).any()


def test_refusals() -> None:
    with pytest.raises(Refused, match="causal attention"):
        zoo.method("window-diffusion").apply(build())
    with pytest.raises(Refused, match="looks both ways"):
        zoo.method("prompt-lookup").apply(load())
    with pytest.raises(Refused, match="a mask token"):
        zoo.method("window-diffusion", mask_id=900).apply(load())
    applied = zoo.method("window-diffusion").apply(load())
    with pytest.raises(BadInput, match="max_new_tokens"):
        applied.generate(input_ids=prompts())
    with pytest.raises(Refused, match="leave out num_beams"):
        applied.generate(input_ids=prompts(), max_new_tokens=4, num_beams=2)
    with pytest.raises(BadInput, match="nothing to report"):
        _ = applied.report
