"""TraceNAS: the search space, masked models, gradient correlations, the search, and continued pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, build, decoder_of, ids, logits, padded, state

import zoo
from zoo.dialogues import Dialogue
from zoo.engines.evolution import Dice
from zoo.engines.statistics import SquareSum, Watch, stream
from zoo.engines.surgery import Block, keep_channels, keep_heads, remove_blocks
from zoo.errors import BadInput, BadParameter, Refused, RunFailed
from zoo.methods.weights._tracenas_space import Space, parts_of
from zoo.methods.weights._tracenas_traces import Traces, correlation, narrowed
from zoo.methods.weights.tracenas import TraceNAS, masks_of
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

QUICK: dict[str, Any] = {"population": 6, "elites": 2, "iterations": 2, "windows": 4}


def dice(seed: int = 0) -> Dice:
    return Dice(torch.Generator().manual_seed(seed))


def space_of(loaded: LoadedModel, sparsity: float = 0.3, width: float = 0.28, depth: float = 0.6) -> Space:
    decoder = decoder_of(loaded)
    seen = stream(
        decoder,
        ids(),
        lambda layer: {
            "output": Watch(layer.attention.output, SquareSum()),
            "down": Watch(layer.mlp.down, SquareSum()),
        },
    )
    return Space(parts_of(decoder, seen), (1 - sparsity) * decoder.prunable_parameters(), width, depth)


# --- the space --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "phi3", "gemma3"])
def test_architectures_have_the_size_that_was_asked_for(name: str) -> None:
    loaded = build(name)
    space, draws = space_of(loaded), dice()
    dense = [part.units for part in space.parts]
    assert space.weights(dense) == decoder_of(loaded).prunable_parameters()
    found = [kept for kept in (space.random(draws) for _ in range(40)) if kept is not None]
    found += [
        kept
        for kept in (space.child(found[0], found[1], cross, draws) for cross in (True, False) * 20)
        if kept is not None
    ]
    smallest = min(part.cost * part.step for part in space.parts)
    assert len(set(found)) > 20
    for kept in found:
        assert abs(space.weights(kept) - space.budget) <= smallest
        for kind in ("attention", "mlp"):
            own = [units for part, units in zip(space.parts, kept, strict=True) if part.block.part == kind]
            assert sum(units > 0 for units in own) >= 2
        assert all(
            units == 0 or space.least(part) <= units <= part.units
            for part, units in zip(space.parts, kept, strict=True)
        )
    assert any(0 in kept for kept in found)


def test_weights_of_a_part_are_those_that_leave() -> None:
    """Surgery, not arithmetic, says how many."""
    for name in ("llama-mha", "llama-gqa"):
        space = space_of(build(name))
        for place, part in enumerate(space.parts):
            for units in (1, part.units - 1):
                loaded = build(name)
                decoder = decoder_of(loaded)
                dense, layer = decoder.prunable_parameters(), decoder.layers[part.block.index]
                if part.block.part == "attention":
                    keep_heads(layer.attention, part.mask(units))
                else:
                    keep_channels(layer.mlp, part.mask(units))
                kept = [units if i == place else other.units for i, other in enumerate(space.parts)]
                assert decoder_of(loaded).prunable_parameters() == space.weights(kept) < dense


def test_the_best_heads_and_channels_stay() -> None:
    loaded = build("llama-gqa")
    layer = decoder_of(loaded).layers[1]
    with torch.no_grad():
        layer.attention.output.weight[:, [8 * 1, 8 * 2, 8 * 5]] *= 50  # heads 1, 2 and 5, one of each group
        layer.mlp.down.weight[:, 13] *= 50
    parts = {part.block: part for part in space_of(loaded).parts}
    attention, mlp = parts[Block(1, "attention")], parts[Block(1, "mlp")]
    assert attention.mask(1).nonzero().flatten().tolist() == [1, 2, 5]
    assert attention.mask(2).all()
    assert mlp.step == 10
    assert mlp.mask(1)[13]
    assert int(mlp.mask(1).sum()) == 10
    assert attention.importance > parts[Block(0, "attention")].importance


def test_a_blend_keeps_what_both_parents_have() -> None:
    space, draws = space_of(build("llama-mha"), depth=0.3), dice()
    still = Space(space.parts, space.budget, space.width, space.depth, mutation=0)
    found = [kept for kept in (still.random(draws) for _ in range(60)) if kept is not None]
    first, second = (
        found[0],
        next(kept for kept in found if [x > 0 for x in kept] != [x > 0 for x in found[0]]),
    )
    for _ in range(20):
        child = still.child(first, second, True, draws)
        if child is None:
            continue
        for one, other, own in zip(first, second, child, strict=True):
            assert (own > 0) in {one > 0, other > 0}
    assert still.child(first, second, False, draws) == first


# --- traces -----------------------------------------------------------------------------------------------------


def test_correlation_is_that_of_pearson() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, generator=generator)
    y = 0.5 * x + y + 3

    def z(v: torch.Tensor) -> torch.Tensor:
        return (v - v.mean()) / v.std()

    expected = float(z(x) @ z(y) / 60)
    pieces = [x[:20].view(4, 5), x[20:]], [y[:20].view(4, 5), y[20:]]
    assert correlation(*pieces) == pytest.approx(expected, abs=1e-6)
    padded_x, padded_y = (torch.cat([v, torch.zeros(30)]) for v in (x, y))
    assert correlation(*pieces, zeros=30) == pytest.approx(float(z(padded_x) @ z(padded_y) / 90), abs=1e-6)
    assert correlation([x], [7 * x]) == pytest.approx(59 / 60, abs=1e-6)
    assert correlation([torch.ones(5)], [torch.arange(5.0)]) == 0


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_masked_model_is_the_smaller_one(name: str) -> None:
    loaded = build(name)
    decoder, space = decoder_of(loaded), space_of(loaded, depth=0.3)
    kept = [max(1, part.units // 2) for part in space.parts]
    kept[0], kept[3] = 0, 0
    masks, dense = masks_of(space, tuple(kept)), logits(loaded.model, **padded())
    with narrowed(decoder, masks):
        masked = logits(loaded.model, **padded())
    assert torch.equal(logits(loaded.model, **padded()), dense)
    for block, mask in masks.items():
        layer = decoder.layers[block.index]
        if mask is not None and block.part == "attention":
            keep_heads(layer.attention, mask)
        elif mask is not None:
            keep_channels(layer.mlp, mask)
    remove_blocks(decoder_of(loaded), [block for block, mask in masks.items() if mask is None])
    torch.testing.assert_close(logits(loaded.model, **padded()), masked, rtol=0, atol=1e-4)


def test_gradients_of_what_is_hidden_are_zero() -> None:
    loaded = build("llama-mha")
    traces = Traces(decoder_of(loaded), ids(), 3, None, torch.Generator())
    space = space_of(loaded)
    masks = masks_of(space, tuple(max(1, part.units // 2) for part in space.parts))
    with narrowed(traces.decoder, masks):
        found = traces._trace([Block(1, "attention"), Block(1, "mlp")])
    heads, channels = masks[Block(1, "attention")], masks[Block(1, "mlp")]
    assert heads is not None
    assert channels is not None
    rows = heads.repeat_interleave(8)
    query, key, value, output = found[Block(1, "attention")]
    gate, up, down = found[Block(1, "mlp")]
    for gradient, kept in ((query, rows), (key, rows), (value, rows), (output.T, rows), (gate, channels)):
        assert not gradient[~kept].any()
        assert gradient[kept].abs().sum(1).all()
    for gradient in (up, down.T):
        assert not gradient[~channels].any()
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.parametrize("rank", [None, 4])
def test_the_dense_model_goes_along_with_itself(rank: int | None) -> None:
    loaded = build("llama-gqa")
    traces = Traces(decoder_of(loaded), ids(), 6, rank, torch.Generator().manual_seed(0))
    space = space_of(loaded)
    whole = masks_of(space, tuple(part.units for part in space.parts))
    assert traces.score(whole) == pytest.approx(6, abs=0.01)
    half = {**whole, Block(2, "mlp"): None}
    assert 0 < traces.score(half) < 4.99
    assert sum(piece.shape[-1] == 4 for pieces in traces.base.values() for piece in pieces) == (
        21 if rank else 0
    )


def test_gradients_of_adapters_are_those_of_lora() -> None:
    """At ``B = 0`` the gradient by B is that by the weight times ``A^T``; by A it is zero."""
    loaded = build("llama-mha")
    decoder, windows = decoder_of(loaded), ids(2, 10)
    traces = Traces(decoder, windows, 2, 3, torch.Generator().manual_seed(0))
    layer = decoder.layers[0]
    weight = layer.mlp.down.linear.weight
    adapter = traces._adapters[id(weight)]
    start = torch.zeros(len(weight), 3, requires_grad=True)
    hook = layer.mlp.down.linear.register_forward_hook(
        lambda _, args, output: output + args[0] @ adapter.T @ start.T
    )
    logits_ = loaded.model(input_ids=windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits_.reshape(-1, 97), windows[:, 1:].reshape(-1))
    (expected,) = torch.autograd.grad(loss, start)
    hook.remove()
    torch.testing.assert_close(traces.base[Block(0, "mlp")][2], expected, rtol=1e-3, atol=1e-6)


# --- search and result ------------------------------------------------------------------------------------------


def test_the_search_finds_better_architectures_of_the_same_size() -> None:
    loaded, key = build("llama-mha"), "gradient correlation, mean over blocks left"
    first, found = (
        TraceNAS(depth=1, population=6, elites=2, iterations=iterations).apply(loaded, calibration=ids())
        for iterations in (0, 6)
    )
    assert found.report.facts[key] > first.report.facts[key] + 0.005
    for applied in (first, found):
        assert applied.report.kept == decoder_of(applied.loaded).prunable_parameters()
        assert abs(applied.report.kept / applied.report.total - 0.7) < 0.02
    assert first.report.facts["architectures compared"] == 6
    assert found.report.facts["architectures compared"] == 30


@pytest.mark.parametrize("name", ["llama-gqa", "phi3"])
def test_seeded_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    loaded = build(name)
    before = state(loaded.model)
    method = TraceNAS(depth=0.3, **QUICK)
    applied, again = (method.apply(loaded, calibration=ids(), seed=3) for _ in range(2))
    assert torch.equal(logits(applied.model, **padded()), logits(again.model, **padded()))
    assert all(torch.equal(value, before[key]) for key, value in state(loaded.model).items())
    applied.save(tmp_path / "small")
    reloaded = zoo.load_model(str(tmp_path / "small"))
    assert torch.equal(logits(reloaded.model, **padded()), logits(applied.model, **padded()))


def test_bad_requests() -> None:
    loaded = build("llama-gqa")
    with pytest.raises(BadParameter, match="no architecture of this model"):
        TraceNAS(sparsity=0.9, **QUICK).apply(loaded, calibration=ids())
    with pytest.raises(BadInput, match="two tokens"):
        TraceNAS(**QUICK).apply(loaded, calibration=ids(6, 1))
    with pytest.raises(BadParameter, match="elites"):
        zoo.method("tracenas", population=4, elites=4)
    loaded.model.lm_head.weight = torch.nn.Parameter(torch.full_like(loaded.model.lm_head.weight, torch.nan))
    with pytest.raises(RunFailed, match="NaN"):
        TraceNAS(**QUICK).apply(loaded, calibration=ids())


def test_the_rate_is_stable_and_then_decays() -> None:
    """Warm-up over a tenth, then constant, then straight down in the last fifth of what is left."""
    recipe = TraceNAS.recipe.model_copy(update={"warmup": 0.1})
    rates = [recipe.rate_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:82] == [1.0] * 72
    assert rates[82:] == pytest.approx([(100 - step) / 18 for step in range(82, 100)])


def test_continued_pretraining_lowers_the_loss(tmp_path: Path) -> None:
    """All weights that are left learn; a model that was pruned and saved before is not searched again."""
    model, processor = tiny_model("tiny-llama")
    dense = LoadedModel(model, processor, "tiny-llama")
    before = state(dense.model)
    texts = [
        f"the {word} sat on the mat and looked at the {word}" for word in ("cat", "dog", "cow", "hen", "fox")
    ]
    data, options = (
        [Dialogue("", text) for text in texts * 2],
        {"steps": 12, "learning_rate": 0.01, "batch": 4},
    )
    trained = zoo.train(
        "tracenas",
        dense,
        data,
        output=tmp_path / "out",
        parameters=QUICK,
        recipe=options,
        calibration=texts * 60,
    )
    key = "held-out perplexity"
    assert trained.record.after[key] < 0.7 * trained.record.before[key]
    assert trained.record.recipe["schedule"] == "stable-decay"
    assert all(torch.equal(value, before[name]) for name, value in state(dense.model).items())
    small = zoo.load_model(str(tmp_path / "out" / "model"))
    assert decoder_of(small).prunable_parameters() < decoder_of(dense).prunable_parameters()

    further = zoo.train("tracenas", small, data, output=tmp_path / "more", recipe={**options, "steps": 2})
    assert further.record.before[key] == pytest.approx(trained.record.after[key], rel=1e-3)
    with pytest.raises(Refused, match="was pruned by tracenas"):
        zoo.train("cfsp", small, data, output=tmp_path / "other")
