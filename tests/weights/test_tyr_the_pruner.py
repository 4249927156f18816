"""Týr-the-Pruner: local pruning, the supernet, the search that keeps the budget, and the smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, build, decoder_of, ids, logits, padded, state

import zoo
from zoo.engines.evolution import Dice
from zoo.errors import BadInput, BadParameter, RunFailed
from zoo.methods.weights._tyr_divergence import DenseOutputs
from zoo.methods.weights._tyr_local import GroupPruner
from zoo.methods.weights._tyr_supernet import Supernet, rectangular, step_of
from zoo.methods.weights.tyr_the_pruner import TyrThePruner

QUICK: dict[str, Any] = {"rounds": 2, "generations": 3, "offspring": 6, "tokens": (40, 80, 200)}


def nothing(*_: int) -> None:
    pass


def supernet_of(name: str, sparsity: float = 0.3, whole_groups: bool = True, number: int = 0) -> Supernet:
    supernet = Supernet(decoder_of(build(name)), sparsity, whole_groups)
    with torch.no_grad():
        supernet.build(ids(), number, levels=9, updates=4, batch=3, device=None, progress=nothing)
    return supernet


# --- local pruning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "updates"), [(1, 1), (1, 5), (4, 1)])
def test_what_is_left_is_solved_by_least_squares(size: int, updates: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator, dtype=torch.float64) @ torch.randn(
        24, 24, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    pruner = GroupPruner(weight, (x.T @ x).float(), size)
    kept, found = pruner.keep(24 // size // 2, updates)
    columns = kept.repeat_interleave(size)
    assert int(kept.sum()) == 24 // size // 2
    assert not found[:, ~columns].any()
    # Damping is ridge regression towards the dense weights' outputs on extra inputs.
    ridge = (0.01 * (x * x).sum(0).mean()).sqrt() * torch.eye(24, dtype=torch.float64)
    inputs = torch.cat([x, ridge])
    best = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution.T
    torch.testing.assert_close(found[:, columns].double(), best, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_silent_or_copies_leave_first() -> None:
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    x[:, 7] = 0.01 * x[:, 7]
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    kept, found = GroupPruner(weight, x.T @ x, 1).keep(10, 1)
    assert (~kept).nonzero().flatten().tolist() == [3, 7]
    assert not found[:, [3, 7]].any()


def test_all_and_none() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    pruner = GroupPruner(weight, torch.eye(6), 2)
    assert torch.equal(pruner.keep(3, 1)[1], weight)
    kept, found = pruner.keep(0, 1)
    assert not kept.any()
    assert not found.any()


# --- the supernet -----------------------------------------------------------------------------------------------


def test_steps_of_the_paper() -> None:
    """Of Llama-2-7B in weights: 2,097,152 per attention and 5,636,096 per MLP, halved in each round."""
    assert [step_of("output", 32, number) * 128 * 4096 for number in (0, 1)] == [2097152, 1048576]
    assert [step_of("down", 11008, number) * 4096 for number in (0, 1)] == [5636096, 2818048]
    assert [step_of("output", 32, number) for number in range(5)] == [4, 2, 1, 1, 1]
    assert [step_of("down", 1536, number) for number in range(5)] == [192, 96, 48, 32, 32]
    assert step_of("down", 80, 2) == 10


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "phi3", "gemma3"])
def test_levels_lie_around_the_budget(name: str) -> None:
    supernet = supernet_of(name)
    for slot in supernet.slots:
        step = supernet.step(slot.kind, 0)
        for level, variant in slot.variants.items():
            assert int(variant.kept.sum()) == slot.groups - slot.removed - level * step
            assert variant.columns.shape == (48, int(variant.kept.sum()) * slot.size)
        assert 0 in slot.variants
        assert slot.removed + min(slot.variants) * step >= 0
    removed = sum(slot.removed * slot.cost for slot in supernet.slots)
    total = supernet.decoder.prunable_parameters()
    assert abs(removed / total - 0.3) < 0.005


def test_steps_are_exchanged_within_a_kind_only() -> None:
    supernet, dice, method = supernet_of("llama-mha"), Dice(torch.Generator().manual_seed(0)), TyrThePruner()
    parent = (0,) * len(supernet.slots)
    seen = set()
    for _ in range(60):
        levels = method.mutated(parent, supernet, dice)
        assert levels is not None
        seen.add(levels)
        for kind in ("output", "down"):
            assert sum(x for x, slot in zip(levels, supernet.slots, strict=True) if slot.kind == kind) == 0
        assert all(x in slot.variants for x, slot in zip(levels, supernet.slots, strict=True))
        assert 0 < sum(abs(x - y) for x, y in zip(levels, parent, strict=True)) <= 8 or levels == parent
        parent = levels
    assert len(seen) > 20


def test_variants_can_be_switched_and_undone() -> None:
    loaded = build("llama-gqa")
    before, dense = state(loaded.model), logits(loaded.model, **padded())
    supernet = Supernet(decoder_of(loaded), 0.3, True)
    with torch.no_grad():
        supernet.build(ids(), 0, levels=5, updates=4, batch=6, device=None, progress=nothing)
    zeros = (0,) * len(supernet.slots)
    level_0 = logits(loaded.model, **padded())
    other = tuple(min(slot.variants) for slot in supernet.slots)
    supernet.install(other)
    assert not torch.equal(logits(loaded.model, **padded()), level_0)
    supernet.install(zeros)
    assert torch.equal(logits(loaded.model, **padded()), level_0)
    for slot in supernet.slots:
        slot.restore()
    assert torch.equal(logits(loaded.model, **padded()), dense)
    assert all(torch.equal(value, before[name]) for name, value in state(loaded.model).items())


@pytest.mark.parametrize("whole_groups", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_smaller_model_computes_what_the_supernet_did(name: str, whole_groups: bool) -> None:
    supernet = supernet_of(name, 0.4, whole_groups)
    model = build(name).model
    model.load_state_dict(supernet_state(supernet, model))
    expected = logits(model, **padded())
    loaded = build(name)
    twin = Supernet(decoder_of(loaded), 0.4, whole_groups)
    with torch.no_grad():
        twin.build(ids(), 0, levels=9, updates=4, batch=3, device=None, progress=nothing)
    twin.cut()
    torch.testing.assert_close(logits(loaded.model, **padded()), expected, rtol=0, atol=1e-4)
    assert decoder_of(loaded).prunable_parameters() < supernet.decoder.prunable_parameters()


def supernet_state(supernet: Supernet, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of the supernet's own model, whose decoder is all that is known of it."""
    own = {f"model.{name}": value for name, value in supernet.decoder.module.state_dict().items()}
    return {name: own.get(name, value) for name, value in model.state_dict().items()}


def test_single_heads_stay_as_zeros_where_shapes_need_them() -> None:
    kept = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert rectangular(kept).tolist() == [[True, True, False], [False, True, True], [False] * 3]
    assert not rectangular(torch.zeros(2, 2, dtype=torch.bool)).any()


# --- divergence and search --------------------------------------------------------------------------------------


def test_divergence_over_all_logits_is_the_plain_one() -> None:
    dense, other = build("llama-gqa"), build("llama-gqa", seed=1)
    windows = ids(5, 12)
    with torch.no_grad():
        outputs = DenseOutputs(decoder_of(dense), windows, 97, batch=2)
        log_p, log_q = (one.model(input_ids=windows).logits[:, :-1].log_softmax(-1) for one in (dense, other))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    sample = torch.tensor([3, 0, 4])
    found = outputs.divergence(decoder_of(other), sample, 25)
    assert found == pytest.approx(float(expected[sample].flatten()[:25].mean()), rel=1e-4)
    assert outputs.divergence(decoder_of(dense), sample, 25) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        few = DenseOutputs(decoder_of(dense), windows, 10, batch=5)
    assert few.places.shape == (5, 11, 10)
    assert few.divergence(decoder_of(other), sample, 25) != pytest.approx(found, rel=1e-3)


def test_the_search_lowers_the_divergence_at_the_same_size() -> None:
    loaded, key = build("llama-mha"), "KL to the dense model on calibration text"
    plain, searched = (
        TyrThePruner(
            sparsity=0.3, rounds=1, generations=generations, offspring=16, tokens=(120, 120, 120)
        ).apply(loaded, calibration=ids(6, 24))
        for generations in (0, 6)
    )
    assert searched.report.kept == plain.report.kept
    assert abs(searched.report.kept / searched.report.total - 0.7) < 0.005
    assert searched.report.facts[key] < 0.97 * plain.report.facts[key]
    bars = searched.report.bars["FFN channels"]
    assert len({bar.kept for bar in bars}) > 1


def test_a_seed_settles_everything() -> None:
    loaded = build("llama-gqa")
    first, again, other = (
        logits(TyrThePruner(**QUICK).apply(loaded, calibration=ids(), seed=seed).model, **padded())
        for seed in (0, 0, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("heads", ["groups", "single"])
def test_deep_cuts_take_whole_blocks_and_can_be_saved(heads: str, tmp_path: Path) -> None:
    loaded = build("llama-gqa")
    applied = TyrThePruner(sparsity=0.85, heads=heads, **QUICK).apply(loaded, calibration=ids())
    decoder = decoder_of(applied.loaded)
    if heads == "groups":
        assert len(decoder.layers) < 3 or any(not layer.attention.heads for layer in decoder.layers)
    assert any(layer.attention.heads for layer in decoder.layers)
    applied.save(tmp_path / "small")
    again = zoo.load_model(str(tmp_path / "small"))
    assert torch.equal(logits(again.model, **padded()), logits(applied.model, **padded()))


def test_progress_rises_and_an_interruption_leaves_the_model_alone() -> None:
    loaded = build("llama-gqa")
    before, steps = state(loaded.model), []
    TyrThePruner(**QUICK).apply(
        loaded, calibration=ids(), progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(number, 12) for number in range(1, 13)]

    def interrupt(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TyrThePruner(**QUICK).apply(loaded, calibration=ids(), progress=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in state(loaded.model).items())


def test_half_precision() -> None:
    loaded = build("llama-gqa", dtype=torch.bfloat16)
    applied = TyrThePruner(**QUICK).apply(loaded, calibration=ids())
    assert {parameter.dtype for parameter in applied.model.parameters()} == {torch.bfloat16}
    assert bool(logits(applied.model, **padded()).isfinite().all())


def test_bad_requests() -> None:
    loaded = build("llama-gqa")
    with pytest.raises(BadInput, match="two tokens"):
        TyrThePruner(**QUICK).apply(loaded, calibration=ids(6, 1))
    with pytest.raises(BadParameter, match="counts"):
        zoo.method("tyr-the-pruner", tokens=(0, 1, 1))
    loaded.model.lm_head.weight = torch.nn.Parameter(torch.full_like(loaded.model.lm_head.weight, torch.nan))
    with pytest.raises(RunFailed, match="NaN"):
        TyrThePruner(**QUICK).apply(loaded, calibration=ids())
