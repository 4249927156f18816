"""ARMOR: factors, exact choices, the loss, wrapped layers in the model and on disk."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import build, decoder_of, distance, ids, inputs_of, linears, logits

import zoo
from zoo.engines.weight_masks import highest_in_groups
from zoo.errors import BadParameter, Refused
from zoo.families.weights import AppliedPruning
from zoo.methods.weights._armor_factors import (
    Factors,
    adam,
    descend,
    greedy,
    in_proportion,
    normalised,
    reselect,
)
from zoo.methods.weights.armor import Armor, input_weights
from zoo.methods.weights.wanda import Wanda
from zoo.models.modeling_pruned import BlockWrapped

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"block": 16, "iterations": 5, "learning_rate": 1e-2}


def problem(seed: int = 0, block: int = 8) -> tuple[torch.Tensor, torch.Tensor, Factors]:
    """A normalised weight ``[16, 24]``, the weights of its inputs, and factors after a few steps."""
    generator = torch.Generator().manual_seed(seed)
    weight, _, _ = normalised(torch.randn(16, 24, generator=generator))
    moment = torch.rand(24, generator=generator) + 0.1
    factors = Factors.start(weight, moment, (2, 4), block)
    optimiser = adam(factors, 1e-2)
    for _ in range(10):
        descend(factors, optimiser, weight, moment)
    for tensor in (factors.left, factors.core, factors.right):
        tensor.requires_grad_(False)
    return weight, moment, factors


def dense(factors: Factors) -> torch.Tensor:
    """The product, from whole matrices."""
    a, b = torch.block_diag(*factors.left), torch.block_diag(*factors.right)
    return a @ (factors.core * factors.mask) @ b


def test_normalised_columns_then_rows() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    unit, columns, rows = normalised(weight)
    torch.testing.assert_close(unit * rows[:, None] * columns, weight)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(6), rtol=1e-4, atol=1e-4)


def test_it_starts_from_the_best_weights_of_each_group() -> None:
    weight, moment, _ = problem()
    factors = Factors.start(weight, moment, (2, 4), 8)
    assert torch.equal(factors.mask, highest_in_groups(weight.square() * moment, (2, 4)))
    torch.testing.assert_close(factors.product(), weight * factors.mask)


def test_the_product_and_the_loss() -> None:
    weight, moment, factors = problem()
    torch.testing.assert_close(factors.product(), dense(factors))
    expected = sum(
        float(moment[j]) * float((dense(factors) - weight)[i, j]) ** 2 for i in range(16) for j in range(24)
    ) / sum(float(moment[j]) * float(weight[i, j]) ** 2 for i in range(16) for j in range(24))
    assert float(factors.loss(weight, moment)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_choosing_anew_is_the_best_of_all_subsets(pattern: tuple[int, int]) -> None:
    """One matrix block, one group: every subset of its entries, solved as a least-squares problem of its own."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(8, 8, generator=generator)
    moment = torch.rand(8, generator=generator) + 0.1
    factors = Factors.start(weight, moment, pattern, 8)
    factors.left = factors.left + 0.3 * torch.randn(1, 8, 8, generator=generator)
    factors.right = factors.right + 0.3 * torch.randn(1, 8, 8, generator=generator)
    per_row = 8 // pattern[1]
    for group in (0, 5 * per_row, 8 * per_row - 1):
        row, start = group // per_row, group % per_row * pattern[1]
        empty = factors.core * factors.mask
        empty[row, start : start + pattern[1]] = 0
        base = factors.left[0] @ empty @ factors.right[0]
        losses = {}
        for subset in combinations(range(pattern[1]), pattern[0]):
            effects = torch.stack(
                [
                    (factors.left[0][:, row, None] * factors.right[0][start + j] * moment.sqrt()).flatten()
                    for j in subset
                ],
                1,
            )
            rest = ((weight - base) * moment.sqrt()).flatten()
            solution = torch.linalg.lstsq(effects, rest[:, None]).solution
            losses[subset] = (float((effects @ solution - rest[:, None]).square().sum()), solution[:, 0])
        best = min(losses, key=lambda subset: losses[subset][0])
        chosen = Factors(factors.left, factors.core.clone(), factors.mask.clone(), factors.right)
        reselect(chosen, weight, moment, pattern, lambda norms, group=group: torch.tensor([group]))
        kept = chosen.mask[row, start : start + pattern[1]].nonzero().squeeze(1)
        assert tuple(kept.tolist()) == best
        torch.testing.assert_close(chosen.core[row, start + kept], losses[best][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["greedy", "random"])
def test_choosing_anew_never_raises_the_loss(how: str) -> None:
    weight, moment, factors = problem()
    select = greedy if how == "greedy" else in_proportion(torch.Generator().manual_seed(0))
    before = float(factors.loss(weight, moment))
    for _ in range(15):
        mask = factors.mask.clone()
        reselect(factors, weight, moment, (2, 4), select)
        after = float(factors.loss(weight, moment))
        assert after <= before * (1 + 1e-6)
        assert (
            (factors.mask != mask).unflatten(1, (-1, 4)).any(-1).sum()
        ) <= 6  # one group of each of 2 x 3 blocks
        before = after
    assert (factors.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_a_perfect_block_can_be_drawn_from() -> None:
    draw = in_proportion(torch.Generator().manual_seed(0))
    assert draw(torch.zeros(3, 5)).shape == (3,)
    lonely = torch.zeros(4, 5)
    lonely[:, 2] = 1
    assert draw(lonely).tolist() == [2] * 4


def test_patience_ends_the_work() -> None:
    weight = torch.zeros(8, 8)
    weight[:, ::4] = torch.eye(8)[:, :2] + 1  # already sparse: nothing to gain
    method = Armor(block=8, iterations=10**6, patience=3, learning_rate=1e-12)
    torch.testing.assert_close(
        method.factorise(weight, torch.ones(8), 0.5).product(), weight, rtol=1e-4, atol=1e-4
    )


def test_inputs_that_say_nothing_get_the_mean() -> None:
    found = input_weights(torch.tensor([1.0, 0.0, 3.0, torch.inf, torch.nan]))
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 1.5, 1.0, 1.0]))
    assert input_weights(torch.zeros(3)).tolist() == [1.0] * 3


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-gemma3", "tiny-phi3"])
def test_wrapped_layers_compute_the_folded_products(name: str) -> None:
    loaded = build(name)
    applied = Armor(**SETTINGS).apply(loaded, calibration=ids())
    layers = linears(applied.model)
    assert all(isinstance(module, BlockWrapped) for module in layers.values())
    plain = build(name)
    for key, module in linears(plain.model).items():
        wrapped = layers[key]
        core = wrapped.weight
        assert ((core != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
        product = torch.block_diag(*wrapped.left) @ core @ torch.block_diag(*wrapped.right)
        module.weight.data = product.detach()
        module.bias = wrapped.bias
    torch.testing.assert_close(logits(applied.model, ids(2)), logits(plain.model, ids(2)), rtol=0, atol=1e-4)
    for layer in decoder_of(applied.loaded).layers:  # what probes compute rows of attention from
        x = torch.randn(3, layer.attention.query.linear.in_features)
        torch.testing.assert_close(
            layer.attention.query(x), layer.attention.query.linear(x)[:, : layer.attention.query.out_features]
        )
    stored = sum(int((module.weight != 0).sum()) for module in layers.values())
    stored += sum(module.left.numel() + module.right.numel() for module in layers.values())
    assert applied.report.kept == stored


def test_folding_gives_an_ordinary_model() -> None:
    wrapped = Armor(**SETTINGS).apply(build(), calibration=ids())
    folded = Armor(fold=True, **SETTINGS).apply(build(), calibration=ids())
    assert type(folded.model) is type(build().model)
    products = linears(folded.model)
    for key, module in linears(wrapped.model).items():
        assert type(products[key]) is torch.nn.Linear
        if "layers.0." in key:  # behind it, rounding may have turned a choice
            product = torch.block_diag(*module.left) @ module.weight @ torch.block_diag(*module.right)
            torch.testing.assert_close(products[key].weight, product)


def test_it_beats_the_pattern_alone() -> None:
    loaded = build(num_hidden_layers=1)
    calibration, held_out = ids(16, 32), ids(seed=9)
    alone = Wanda(pattern="2:4").apply(loaded, calibration=calibration)
    armor = Armor(block=8, iterations=40, learning_rate=1e-2).apply(loaded, calibration=calibration)
    assert distance(armor.model, loaded.model, held_out) < 0.8 * distance(alone.model, loaded.model, held_out)


def test_bfloat16() -> None:
    applied = Armor(**SETTINGS).apply(build(dtype=torch.bfloat16), calibration=ids())
    assert {parameter.dtype for parameter in applied.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert applied.generate(input_ids=ids(2, 8), max_new_tokens=4, do_sample=False).shape == (2, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AppliedPruning]:
    applied = Armor(**SETTINGS).apply(build("tiny-qwen2"), calibration=ids())
    return applied.save(tmp_path_factory.mktemp("armor") / "model"), applied


def test_saved_and_loaded_it_is_the_same(saved: tuple[Path, AppliedPruning]) -> None:
    folder, applied = saved
    again = zoo.load_model(str(folder))
    assert torch.equal(logits(again.model, ids(2)), logits(applied.model, ids(2)))
    with pytest.raises(Refused, match="wrapped"):
        zoo.method("flap").check(again)


def test_plain_transformers_loads_it_in_a_new_process(
    saved: tuple[Path, AppliedPruning], tmp_path: Path
) -> None:
    folder, applied = saved
    script = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'zoo' not in sys.modules\n"
        "ids = torch.arange(4, 20)[None]\n"
        "print(float(model(input_ids=ids).logits.double().sum()))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    expected = float(logits(applied.model, torch.arange(4, 20)[None]).double().sum())
    assert float(result.stdout) == pytest.approx(expected, rel=1e-5)


def test_refusals() -> None:
    with pytest.raises(Refused, match="multiples of its block"):
        Armor(block=48, pattern="2:4").check(build())
    with pytest.raises(BadParameter, match="needs a pattern"):
        zoo.method("armor", pattern=None)
    with pytest.raises(BadParameter, match="multiple"):
        zoo.method("armor", block=6)


def test_statistics_come_from_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    factorise = Armor.factorise

    def note(self: Armor, weight: torch.Tensor, square_sum: torch.Tensor, sparsity: float) -> Factors:
        seen.append(square_sum)
        return factorise(self, weight, square_sum, sparsity)

    monkeypatch.setattr(Armor, "factorise", note)
    loaded = build()
    inputs = inputs_of(loaded.model, ids())
    Armor(**SETTINGS).apply(loaded, calibration=ids())
    for found, (name, x) in zip(seen, inputs.items(), strict=True):
        torch.testing.assert_close(found, x.square().sum(1).mean(0), msg=name)
