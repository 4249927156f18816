"""Vim and its token pruning: the scan against a loop, alignment against a full sequence with holes, the hooks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import footprint, pixels
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.bench.flops import count_flops
from zoo.engines.scan_tokens import ScanView, positions_of
from zoo.errors import BadInput, BadParameter, Refused
from zoo.methods.encoder_tokens.vision_ssm_token_pruning import ToPViM, importance, keep_tokens
from zoo.models import LoadedModel
from zoo.models.selective_scan import in_chunks, linear_recurrence, selective_scan, token_by_token
from zoo.models.tiny import tiny_model
from zoo.models.vim import VimConfig, VimModel, VimScan


def vim(**changes: Any) -> LoadedModel:
    """``tiny-vim``: 36 patches, [CLS] at place 18, four blocks."""
    return LoadedModel(*tiny_model("tiny-vim", **changes))


def method(**parameters: Any) -> ToPViM:
    return ToPViM(**{"blocks": (1, 3), **parameters})


# --- the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9, 37, 50])
def test_the_chunked_recurrence_is_the_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    decay = torch.rand(2, length, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    added = torch.randn(2, length, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    state, states = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for place in range(length):
        state = decay[:, place] * state + added[:, place]
        states.append(state)
    expected = torch.stack(states, 1)
    found = linear_recurrence(decay, added)
    assert_close(found, expected)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (decay, added)),
        torch.autograd.grad((expected * weight).sum(), (decay, added)),
        strict=True,
    ):
        assert_close(one, other)


def test_states_that_vanish_stay_finite() -> None:
    found = linear_recurrence(torch.full((1, 300, 1), 1e-30), torch.ones(1, 300, 1))
    assert_close(found, torch.ones(1, 300, 1))


def scan_inputs(batch: int, tokens: int, channels: int, size: int) -> list[torch.Tensor]:
    """What a scan takes, in float64: x, step, elapsed, rate, write, read."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    each, state = (batch, tokens, channels), (batch, tokens, size)
    rate = -draw(channels, size).exp()
    return [draw(*each), draw(*each).exp(), draw(*each).exp(), rate, draw(*state), draw(*state)]


@pytest.mark.parametrize("tokens", [1, 9, 50])
def test_the_scan_and_its_gradients_are_those_of_a_loop(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.models.selective_scan._STRETCH", 7 * 2 * 3 * 4)  # seven tokens at a time
    inputs = [given.requires_grad_() for given in scan_inputs(2, tokens, 3, 4)]
    x, step, elapsed, rate, write, read = inputs
    state, outputs = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for place in range(tokens):
        added = (step[:, place] * x[:, place]).unsqueeze(-1) * write[:, place].unsqueeze(1)
        state = torch.exp(elapsed[:, place].unsqueeze(-1) * rate) * state + added
        outputs.append((state * read[:, place].unsqueeze(1)).sum(-1))
    expected = torch.stack(outputs, 1)
    found = selective_scan(*inputs)
    for form in (found, in_chunks(*inputs), token_by_token(*(given.detach() for given in inputs))):
        assert_close(form, expected)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    gradients = (
        torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (found, expected)
    )
    for own, literal, given in zip(*gradients, inputs, strict=True):
        assert_close(own, torch.zeros_like(given) if literal is None else literal)
    torch.library.opcheck(torch.ops.zoo.selective_scan.default, inputs)


def test_the_work_of_a_scan_is_counted() -> None:
    """Beside a loop over numbers that counts what it does."""
    batch, tokens, channels, size = 2, 5, 3, 4
    x, step, elapsed, rate, write, read = scan_inputs(batch, tokens, channels, size)
    work, y = 0, torch.zeros_like(x)
    for sample in range(batch):
        for channel in range(channels):
            state = [0.0] * size
            for place in range(tokens):
                here = (sample, place, channel)
                entering = float(step[here] * x[here])
                work += 1
                for number in range(size):
                    decay = math.exp(float(elapsed[here] * rate[channel, number]))
                    added = entering * float(write[sample, place, number])
                    state[number] = decay * state[number] + added
                    y[here] += float(read[sample, place, number]) * state[number]
                    work += 2 + 1 + 2 + 2
    inputs = (x, step, elapsed, rate, write, read)
    assert_close(selective_scan(*inputs), y)
    assert count_flops(lambda: selective_scan(*inputs)) == work


def test_the_work_of_a_block_is_that_of_its_products_and_its_scans() -> None:
    loaded, x = vim(), pixels(2)
    config = loaded.model.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    channels, states, rank = config.expand * config.hidden_size, config.state_size, config.time_step_rank
    scan = channels * (config.conv_kernel + rank + 2 * states + rank) * 2 + channels * (7 * states + 1)
    block = 3 * config.hidden_size * channels * 2 + 2 * scan
    one, two = (
        count_flops(lambda layers=layers: vim(num_hidden_layers=layers).model(pixel_values=x))
        for layers in (1, 2)
    )
    # The causal convolution also runs behind the last token, and that is cut off.
    behind = 2 * channels * config.conv_kernel * 2 * (config.conv_kernel - 1)
    assert two - one == 2 * (tokens * block + behind)


def scan() -> VimScan:
    one = vim().model.vim.layers[0].mixer.forward_scan
    assert isinstance(one, VimScan)
    return one


def by_hand(
    one: VimScan, x: torch.Tensor, gate: torch.Tensor, there: torch.Tensor, decay_gaps: bool = False
) -> torch.Tensor:
    """The scan token by token on the *full* sequence: zeros and no input where ``there [N]`` is false."""
    kernel = one.conv1d.kernel_size[0]
    padded = F.pad((x * there[:, None]).transpose(1, 2), (kernel - 1, 0))
    u = F.silu(F.conv1d(padded, one.conv1d.weight, one.conv1d.bias, groups=x.shape[-1])).transpose(1, 2)
    low_rank, write, read = one.x_proj(u).split(one.sizes, dim=-1)
    step, rate = F.softplus(one.dt_proj(low_rank)), -one.A_log.exp()
    resting = F.softplus(one.dt_proj.bias)
    state, outputs = torch.zeros(len(x), x.shape[-1], rate.shape[1]), []
    for place in range(x.shape[1]):
        if there[place]:
            added = (step[:, place] * u[:, place]).unsqueeze(-1) * write[:, place].unsqueeze(1)
            state = torch.exp(step[:, place].unsqueeze(-1) * rate) * state + added
        elif decay_gaps:
            state = torch.exp(resting.unsqueeze(-1) * rate) * state
        outputs.append((state * read[:, place].unsqueeze(1)).sum(-1) + one.D * u[:, place])
    return torch.stack(outputs, 1) * F.silu(gate)


@torch.no_grad()
@pytest.mark.parametrize("decay_gaps", [False, True])
def test_alignment_equals_a_full_scan_with_holes(decay_gaps: bool) -> None:
    one = scan()
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 2, 21, one.conv1d.in_channels, generator=generator)
    there = torch.rand(21, generator=generator) > 0.4
    assert 5 < int(there.sum()) < 18
    positions = there.nonzero().T.expand(2, -1)
    short = one(x[:, there], gate[:, there], positions, decay_gaps)
    full = by_hand(one, x, gate, there, decay_gaps)[:, there]
    assert_close(short, full, rtol=1e-5, atol=1e-5)
    torn = one(x[:, there], gate[:, there])
    assert (torn - full).abs().max() > 0.01


@torch.no_grad()
def test_positions_without_gaps_change_nothing() -> None:
    one = scan()
    x, gate = torch.randn(2, 2, 9, one.conv1d.in_channels, generator=torch.Generator().manual_seed(1))
    everything = torch.arange(9).expand(2, -1)
    dense = one(x, gate)
    assert_close(dense, by_hand(one, x, gate, torch.ones(9, dtype=torch.bool)), rtol=1e-5, atol=1e-5)
    for decay_gaps in (False, True):
        assert_close(one(x, gate, everything, decay_gaps), dense, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_is_an_ordinary_model(tmp_path: Path) -> None:
    loaded, x = vim(), pixels()
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    again = zoo.load_model(tmp_path, device="cpu")
    assert torch.equal(again.model(pixel_values=x).logits, loaded.model(pixel_values=x).logits)
    assert again.processor is not None
    in_half = zoo.load_model(tmp_path, device="cpu", dtype="bf16").model(pixel_values=x).logits
    assert in_half.dtype == torch.bfloat16
    assert F.cosine_similarity(in_half.float(), loaded.model(pixel_values=x).logits).min() > 0.99
    with pytest.raises(ValueError, match="48 x 48"):
        loaded.model(pixel_values=pixels(size=40))


def test_a_fresh_model_starts_as_mamba_does() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VimModel(VimConfig(hidden_size=32, num_hidden_layers=1, image_size=16, patch_size=8))
    one = model.layers[0].mixer.backward_scan
    assert_close(one.A_log.exp()[3], torch.arange(1.0, 17.0))
    steps = F.softplus(one.dt_proj.bias)
    assert 0.0009 < steps.min() < steps.max() < 0.11
    model(pixel_values=pixels(size=16)).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- choosing --------------------------------------------------------------------------------------------------


def test_importance_counts_only_what_is_positive() -> None:
    assert importance(torch.tensor([[[1.0, -5.0, 2.0], [-1.0, -1.0, 0.5]]])).tolist() == [[3.0, 0.5]]


def test_patches_come_in_order_with_cls_in_their_middle() -> None:
    scores = torch.tensor([[9.0, 1.0, 8.0, 0.0, 2.0, 7.0, 6.0], [0.0, 1.0, 2.0, 99.0, 3.0, 4.0, 5.0]])
    # 6 patches: ceil(6 * 0.6) = 4 is even, hence 5 tokens, [CLS] among them.
    assert keep_tokens(scores, 0.6, cls=3).tolist() == [[0, 2, 3, 5, 6], [2, 4, 3, 5, 6]]
    assert keep_tokens(scores, 0.01, cls=3).tolist() == [[3], [3]]
    assert keep_tokens(scores, 0.4, cls=None).tolist() == [[0, 2, 5], [3, 5, 6]]


def test_positions_let_cls_move_no_further_than_it_must() -> None:
    positions = torch.arange(7).expand(2, -1)
    kept = torch.tensor([[0, 2, 3, 5, 6], [2, 4, 3, 5, 6]])
    # In the second row patch 4 comes to stand in front of [CLS]: they change places.
    assert positions_of(kept, positions, 3, 2).tolist() == [[0, 2, 3, 5, 6], [2, 3, 4, 5, 6]]
    kept = torch.tensor([[0, 1, 3, 2, 6]])
    assert positions_of(kept, positions[:1], 3, 2).tolist() == [[0, 1, 2, 3, 6]]
    assert positions_of(torch.tensor([[3]]), positions[:1], 3, 0).tolist() == [[3]]
    assert positions_of(torch.tensor([[1, 5]]), positions[:1], None, None).tolist() == [[1, 5]]


@torch.no_grad()
def test_what_is_ranked_is_what_enters_the_output_projection() -> None:
    loaded, x = vim(), pixels()
    seen: list[torch.Tensor] = []

    class Watching(ToPViM):
        def select(self, view: ScanView) -> torch.Tensor:
            assert view.output is not None
            assert view.backward is not None
            seen.extend((view.output, view.backward))
            return super().select(view)

    mixer = loaded.model.vim.layers[0].mixer
    with Watching(blocks=(1,)).apply(loaded) as applied:
        applied(pixel_values=x)
    gathered: list[torch.Tensor] = []
    hook = mixer.forward_scan.register_forward_hook(lambda _, args, output: gathered.append(output))
    loaded.model(pixel_values=x)
    hook.remove()
    assert_close(seen[0], (gathered[0] + seen[1].flip(1)) / 2)


# --- running ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_really_leave() -> None:
    loaded = vim()
    lengths: list[int] = []
    hooks = [
        layer.mixer.in_proj.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        for layer in loaded.model.vim.layers
    ]
    with method(keep_ratio=0.7).apply(loaded) as applied:
        last = loaded.model.vim(pixel_values=pixels()).last_hidden_state
    for hook in hooks:
        hook.remove()
    # 36 patches: ceil(25.2) = 26 -> 27 tokens; 26 patches: ceil(18.2) = 19 tokens.
    assert lengths == applied.tokens_per_block == [37, 27, 27, 19]
    assert last.shape[1] == 19
    report = applied.report
    assert report.facts["tokens left at the end"] == 19
    assert report.kept == pytest.approx(sum(lengths) / 4)
    kept = applied.reducer.kept
    assert kept[:, 9].tolist() == [18, 18]
    assert all(row.tolist() == sorted(row.tolist()) for row in torch.cat((kept[:, :9], kept[:, 10:]), 1))
    assert_close(applied.sources @ applied.unmerge(last), last)
    assert applied.reducer.patch_sources.shape == (2, 18, 36)
    with pytest.raises(BadInput, match=r"\[2, 19, dim\]"):
        applied.unmerge(last[:, 1:])


@torch.no_grad()
def test_pruning_equals_the_dense_model_on_what_is_left() -> None:
    """Blocks by hand: cut hidden states and stream, give positions on."""
    loaded, x = vim(), pixels()
    with method(blocks=(2,), keep_ratio=0.5).apply(loaded) as applied:
        found = loaded.model.vim(pixel_values=x).last_hidden_state
    model, kept = loaded.model.vim, applied.reducer.kept
    states: list[Any] = []
    hook = model.layers[1].register_forward_hook(lambda _, args, output: states.append(output))
    model(pixel_values=x)
    hook.remove()
    hidden, residual = (part.gather(1, kept.unsqueeze(-1).expand(-1, -1, 64)) for part in states[0])
    positions = positions_of(kept, torch.arange(37).expand(2, -1), 18, (kept.shape[1] - 1) // 2)
    for layer in model.layers[2:]:
        hidden, residual = layer(hidden, residual, positions)
    assert_close(found, model.norm(hidden + residual))


@torch.no_grad()
def test_each_sample_is_as_alone_and_nothing_stays_behind() -> None:
    loaded, x = vim(), pixels(3)
    before, dense = footprint(loaded.model), loaded.model(pixel_values=x).logits
    for alignment in ("hold", "decay", "none"):
        with method(alignment=alignment, keep_ratio=0.6).apply(loaded) as applied:
            together = applied(pixel_values=x).logits
            alone = [applied(pixel_values=x[row : row + 1]).logits for row in range(3)]
            with pytest.raises(ValueError, match="pixels"):
                applied(pixel_values=pixels(size=40))
            assert_close(applied(pixel_values=x).logits, together)
        assert_close(torch.cat(alone), together)
        assert (together - dense).abs().max() > 0.01
    assert footprint(loaded.model) == before
    with method(keep_ratio=1.0).apply(loaded) as applied:
        assert torch.equal(applied(pixel_values=x).logits, dense)
    assert torch.equal(loaded.model(pixel_values=x).logits, dense)


@torch.no_grad()
def test_an_encoder_without_cls_keeps_the_order() -> None:
    loaded = vim(use_cls_token=False)
    with method(keep_ratio=0.5, score="released").apply(loaded) as applied:
        applied(pixel_values=pixels())
    assert applied.tokens_per_block == [36, 18, 18, 9]
    assert all(row.tolist() == sorted(row.tolist()) for row in applied.reducer.kept)
    assert applied.reducer.patch_sources.shape == (2, 9, 36)


@torch.no_grad()
def test_half_precision() -> None:
    loaded, x = vim(), pixels()
    with method().apply(loaded) as applied:
        full = applied(pixel_values=x).logits
    loaded.model.to(torch.bfloat16)
    with method().apply(loaded) as applied:
        half = applied(pixel_values=x.bfloat16()).logits
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), full).min() > 0.95


def test_refusals() -> None:
    with pytest.raises(Refused, match=r"needs a vision state-space model such as Vim; this model has .*vit"):
        method().check(LoadedModel(*tiny_model("tiny-vit")))
    with pytest.raises(Refused, match="behind block 15, but this model has only 4"):
        ToPViM().check(vim())
    with pytest.raises(Refused, match=r"tome needs a vision encoder; this model has .*state-space"):
        zoo.method("tome").check(vim())
    with pytest.raises(BadParameter, match="blocks"):
        zoo.method("vision-ssm-token-pruning", blocks=[0])
