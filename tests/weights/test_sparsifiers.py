"""Wanda, SparseGPT and magnitude: formulas against slow references, patterns, saving, planted examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import MODELS, build, decoder_of, distance, ids, inputs_of, linears, logits, loud_inputs

import zoo
from zoo.errors import BadParameter
from zoo.families.weight_sparsity import WeightSparsifier
from zoo.methods.weights.magnitude import Magnitude
from zoo.methods.weights.sparsegpt import SparseGPT
from zoo.methods.weights.wanda import Wanda, by_cumulative_share
from zoo.models import LoadedModel

KINDS: tuple[type[WeightSparsifier], ...] = (Wanda, SparseGPT, Magnitude)


def zeros(model: Any) -> dict[str, torch.Tensor]:
    return {name: module.weight == 0 for name, module in linears(model).items()}


def slow_wanda(row: torch.Tensor, norms: torch.Tensor, gone: int) -> set[int]:
    ranked = sorted(range(len(row)), key=lambda place: abs(float(row[place])) * float(norms[place]))
    return set(ranked[:gone])


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-phi3", "tiny-gemma3"])
def test_wanda_is_its_formula_on_inputs_from_sparse_layers(name: str) -> None:
    """Every layer's inputs are read from the finished model, whose earlier layers are as sparse as they were then."""
    loaded = build(name)
    applied = Wanda(sparsity=0.4).apply(loaded, calibration=ids())
    dense = linears(loaded.model)
    for index in range(len(decoder_of(loaded).layers)):
        behind_sparse = build(name)
        state = behind_sparse.model.state_dict()
        sparse = applied.model.state_dict()
        earlier = [key for key in state if any(f"layers.{before}." in key for before in range(index))]
        behind_sparse.model.load_state_dict({**state, **{key: sparse[key] for key in earlier}})
        inputs = inputs_of(behind_sparse.model, ids())
        for key, module in dense.items():
            if f"layers.{index}." not in key:
                continue
            norms = inputs[key].float().square().sum(1).mean(0).sqrt()
            found = zeros(applied.model)[key]
            for row in (0, len(found) - 1):
                expected = slow_wanda(module.weight[row].detach(), norms, int(0.4 * found.shape[1]))
                assert set(found[row].nonzero().squeeze(1).tolist()) == expected, (key, row)


def test_what_stays_is_untouched_but_by_sparsegpt() -> None:
    loaded = build()
    dense = linears(loaded.model)
    for kind in KINDS:
        changed = 0
        for key, module in linears(kind().apply(loaded, calibration=ids()).model).items():
            kept = module.weight != 0
            changed += int((module.weight[kept] != dense[key].weight[kept]).sum())
        assert (changed > 0) == (kind is SparseGPT)


def test_magnitude_needs_no_text() -> None:
    loaded = LoadedModel(build().model)  # without a tokenizer, so calibration text could not even be read
    applied = Magnitude(sparsity=0.3).apply(loaded)
    assert "calibration windows" not in applied.report.facts
    for key, module in linears(loaded.model).items():
        ranked = module.weight.detach().abs().flatten().sort().values
        expected = module.weight.abs() <= ranked[int(0.3 * len(ranked))]
        assert torch.equal(zeros(applied.model)[key], expected)


def test_sparsegpt_beats_the_same_mask_without_repair() -> None:
    """On each matrix: less error than its own mask alone, which errs less than magnitude's."""
    loaded = build()
    method = SparseGPT(sparsity=0.6, block=32)
    inputs = inputs_of(loaded.model, ids(8, 32))
    for key, module in linears(loaded.model).items():
        x = inputs[key].flatten(0, 1)
        observer = method.observer(x.shape[1])
        observer.update(x)
        weight = module.weight.detach()
        repaired = method.solve(weight, observer.hessian, 0.6)
        plain = weight * (repaired != 0)
        magnitude = weight * Magnitude().kept(weight, 0.6)
        errors = [float(((new - weight) @ x.T).square().sum()) for new in (repaired, plain, magnitude)]
        assert errors[0] < errors[1]
        assert errors[0] < 0.9 * errors[2], key


def test_dead_inputs_lose_their_weights() -> None:
    weight, x = torch.randn(6, 8), torch.randn(50, 8)
    x[:, 3] = 0
    method = SparseGPT(sparsity=0.25)
    observer = method.observer(8)
    observer.update(x)
    assert (method.solve(weight, observer.hessian, 0.25)[:, 3] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-phi3"])
def test_a_pattern_holds_everywhere(kind: type[WeightSparsifier], pattern: str, name: str) -> None:
    applied = kind(pattern=pattern).apply(build(name), calibration=ids())
    kept, length = map(int, pattern.split(":"))
    for module in linears(applied.model).values():
        groups = (module.weight != 0).unflatten(1, (-1, length)).sum(-1)
        assert (groups <= kept).all()
        assert (groups == kept).float().mean() > 0.99
    assert applied.report.kept_ratio == pytest.approx(kept / length, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_report_counts_zeros(kind: type[WeightSparsifier], name: str) -> None:
    loaded = build(name)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    applied = kind(sparsity=0.5).apply(loaded, calibration=ids())
    gone = sum(int(mask.sum()) for mask in zeros(applied.model).values())
    total = sum(mask.numel() for mask in zeros(applied.model).values())
    assert applied.report.total - applied.report.kept == gone
    assert applied.report.removed_ratio == pytest.approx(0.5, abs=0.01)
    assert applied.report.total == total
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_decides_almost_alike(kind: type[WeightSparsifier]) -> None:
    full = zeros(kind().apply(build(), calibration=ids()).model)
    applied = kind().apply(build(dtype=torch.bfloat16), calibration=ids())
    half = zeros(applied.model)
    assert {parameter.dtype for parameter in applied.model.parameters()} == {torch.bfloat16}
    same = sum(int((full[key] == half[key]).sum()) for key in full)
    assert same / sum(mask.numel() for mask in full.values()) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_do_not_depend_on_how_many_windows_run_at_once(
    kind: type[WeightSparsifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    for batch in (1, 4):
        monkeypatch.setattr("zoo.families.weights.Work.batch", batch)
        masks.append(zeros(kind().apply(build(), calibration=ids()).model))
    different = sum(int((masks[0][key] != masks[1][key]).sum()) for key in masks[0])
    assert different <= 2  # sums in another order may turn a near tie


@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
def test_better_than_magnitude_where_inputs_differ_in_size(kind: type[WeightSparsifier]) -> None:
    loaded = build()
    loud_inputs(loaded)
    away = {
        cls: distance(
            cls(sparsity=0.5).apply(loaded, calibration=ids(16, 32)).model, loaded.model, ids(seed=9)
        )
        for cls in (kind, Magnitude)
    }
    assert away[kind] < 0.7 * away[Magnitude]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: type[WeightSparsifier], tmp_path: Path) -> None:
    applied = kind(pattern="2:4").apply(build("tiny-qwen2"), calibration=ids())
    again = zoo.load_model(str(applied.save(tmp_path / "sparse")))
    assert type(again.model) is type(
        build("tiny-qwen2").model
    )  # nothing that plain transformers could not load
    assert torch.equal(logits(again.model, ids(2)), logits(applied.model, ids(2)))


# --- Wanda's variant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_the_variant_removes_the_same_share_of_each_row(sparsity: float) -> None:
    scores = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)).square()
    kept, alpha = by_cumulative_share(scores, sparsity)
    assert 1 - float(kept.float().mean()) == pytest.approx(sparsity, abs=2e-3)
    for row, mask in zip(scores, kept, strict=True):
        removed, rest = row[~mask], row[mask]
        assert removed.sum() <= alpha * row.sum() * 1.0001
        assert removed.sum() + rest.min() > alpha * row.sum()
        assert removed.max() < rest.min()


def test_rows_of_the_variant_differ() -> None:
    applied = Wanda(sparsity=0.5, variant=True).apply(build(), calibration=ids())
    counts = [mask.sum(1) for mask in zeros(applied.model).values()]
    assert any(len(set(one.tolist())) > 1 for one in counts)
    assert applied.report.removed_ratio == pytest.approx(0.5, abs=0.01)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "settings", "message"),
    [
        ("wanda", {"pattern": "2:4", "variant": True}, "variant"),
        ("wanda", {"pattern": "2:4", "sparsity": 0.5}, "not both"),
        ("wanda", {"pattern": "5:4"}, "at most m"),
        ("sparsegpt", {"pattern": "2:4", "block": 30}, "multiple"),
    ],
)
def test_settings_that_contradict_each_other(slug: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        zoo.method(slug, **settings)
