"""The training loop: schedules, order, accumulation, clipping, checkpoints, resuming, interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zoo.engines.surgery import share_parameters
from zoo.engines.training import (
    Group,
    Loss,
    Recipe,
    Step,
    Task,
    TrainingInterrupted,
    derived_seed,
    fit,
    groups_by_decay,
    order,
)
from zoo.errors import BadInput, RunFailed

EXAMPLES = [(torch.randn(6, generator=torch.Generator().manual_seed(n)), n % 3) for n in range(23)]
RECIPE = Recipe(steps=12, batch=4, learning_rate=0.05, warmup=0.25, weight_decay=0.1, checkpoint_every=5)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def task(module: nn.Module, examples: Any = EXAMPLES) -> Task:
    def collate(chosen: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([x for x, _ in chosen]), torch.tensor([y for _, y in chosen])

    def loss(batch: tuple[torch.Tensor, torch.Tensor], step: int) -> Loss:
        x, y = batch
        total = nn.functional.cross_entropy(module(x).float(), y, reduction="sum")
        return Loss(total, len(y), {"answer": total})

    return Task(groups_by_decay(module.named_parameters()), examples, collate, loss, module, "pictures")


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def interrupt_after(step: int) -> Callable[[Step], None]:
    def progress(now: Step) -> None:
        if now.step == step:
            raise KeyboardInterrupt

    return progress


def test_it_learns_and_logs_every_step(tmp_path: Path) -> None:
    module = network()
    history = fit(task(module), RECIPE.model_copy(update={"steps": 60}), tmp_path)
    losses = [row.loss for row in history]
    assert [row.step for row in history] == list(range(1, 61))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == losses
    assert rows[0]["terms"] == 4
    assert rows[0]["unit"] == "pictures"
    assert rows[3]["parts"]["answer"] == rows[3]["loss"]


@pytest.mark.parametrize("stop", [1, 5, 7, 11])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    whole, parted = network(), network()
    fit(task(whole), RECIPE, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted) as caught:
        fit(task(parted), RECIPE, tmp_path / "parted", progress=interrupt_after(stop))
    assert caught.value.step == stop
    again = network(seed=9)
    torch.manual_seed(stop)  # the global generator must not matter
    history = fit(task(again), RECIPE, tmp_path / "parted", resume=True)
    assert same(weights(again), weights(whole))
    assert [row.step for row in history] == list(range(1, 13))
    loss = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "training.jsonl").open()]
    assert loss == [row.loss for row in history]


def test_an_interrupted_update_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside the optimiser leaves half of the parameters updated: the last checkpoint stands."""
    whole, parted = network(), network()
    fit(task(whole), RECIPE, tmp_path / "whole")
    calls = 0
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(self, *args)
        if calls == 8:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(TrainingInterrupted) as caught:
            fit(task(parted), RECIPE, tmp_path / "parted")
    assert caught.value.step == 5
    again = network()
    fit(task(again), RECIPE, tmp_path / "parted", resume=True)
    assert same(weights(again), weights(whole))


def test_accumulation_weighs_every_term_alike(tmp_path: Path) -> None:
    """Batches of 4 + 4 give the step of one batch of 8, also when their numbers of terms differ."""
    results = []
    for recipe in (
        RECIPE.model_copy(update={"batch": 8, "steps": 3}),
        RECIPE.model_copy(update={"accumulate": 2, "steps": 3}),
    ):
        module = network().eval()
        module[2] = nn.Identity()  # dropout draws differently in other batches
        given = task(module)

        def loss(batch: Any, step: int, module: nn.Module = module) -> Loss:
            x, y = batch
            chosen = y > 0  # a number of terms that varies from batch to batch
            total = nn.functional.cross_entropy(module(x)[chosen], y[chosen], reduction="sum")
            return Loss(total, int(chosen.sum()))

        fit(Task(given.groups, EXAMPLES, given.collate, loss, module), recipe, tmp_path / str(recipe.batch))
        results.append(weights(module))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_has_each_example_once(count: int, first: int, wanted: int, seed: int) -> None:
    sequence = order(count, 0, first + wanted, seed)
    assert order(count, first, wanted, seed) == sequence[first:]
    for epoch in range((first + wanted) // count):
        assert sorted(sequence[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_seeds_give_other_orders() -> None:
    assert len({tuple(order(50, 0, 50, seed)) for seed in range(8)}) == 8
    assert order(50, 50, 50, 0) != order(50, 0, 50, 0)


def test_learning_rates() -> None:
    def rates(**fields: Any) -> list[float]:
        recipe = Recipe(steps=10, **fields)
        return [recipe.rate_at(step, 10) for step in range(10)]

    assert rates(schedule="constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rates(schedule="constant", warmup=0.4) == rates(schedule="constant", warmup=4)
    assert rates(schedule="linear")[5] == pytest.approx(0.5)
    assert rates(schedule="linear", power=0.9)[5] == pytest.approx(0.5**0.9)
    cosine = rates(schedule="cosine", final=0.1)
    assert cosine[0] == 1
    assert cosine[5] == pytest.approx(0.55)
    assert cosine == sorted(cosine, reverse=True)
    assert Recipe(steps=10, final=0.1).rate_at(10, 10) == pytest.approx(0.1)


def test_one_step_is_adamw(tmp_path: Path) -> None:
    """The first update by hand: ``w - lr * (g / (|g| + eps) + decay * w)``, decay for matrices only."""
    module, by_hand = network().eval(), network().eval()
    recipe = Recipe(steps=1, batch=23, learning_rate=0.01, schedule="constant", weight_decay=0.1, clip=None)
    given = task(module)
    chosen = [EXAMPLES[index] for index in order(23, 0, 23, 0)]
    by_hand.train()
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, 0))
        loss = nn.functional.cross_entropy(by_hand(given.collate(chosen)[0]), given.collate(chosen)[1])
        loss.backward()
    fit(given, recipe, tmp_path)
    for name, value in by_hand.named_parameters():
        assert value.grad is not None
        decay = 0.1 if value.dim() > 1 else 0.0
        expected = value - 0.01 * (value.grad / (value.grad.abs() + 1e-8) + decay * value)
        torch.testing.assert_close(module.get_parameter(name), expected, rtol=1e-4, atol=1e-6)


def test_groups_have_rates_and_decays_of_their_own(tmp_path: Path) -> None:
    module = network()
    before = weights(module)
    first, last = dict(module[0].named_parameters()), dict(module[3].named_parameters())
    given = task(module)
    groups = [Group(first, rate=0.0), Group({f"last.{name}": value for name, value in last.items()})]
    fit(Task(groups, EXAMPLES, given.collate, given.loss, module), RECIPE, tmp_path)
    after = weights(module)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["3.weight"], before["3.weight"])


@pytest.mark.parametrize("clip_by", ["norm", "value"])
def test_clipping_bounds_the_gradient(tmp_path: Path, clip_by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    seen: list[torch.Tensor] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        seen.append(
            torch.cat([value.grad.flatten() for value in module.parameters() if value.grad is not None])
        )
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    history = fit(task(module), Recipe(steps=2, clip=0.01, clip_by=clip_by), tmp_path)
    bounded = [row.norm() if clip_by == "norm" else row.abs().max() for row in seen]
    assert all(float(value) == pytest.approx(0.01, rel=1e-3) for value in bounded)
    assert history[0].gradient_norm > 0.02


def test_nothing_else_is_changed(tmp_path: Path) -> None:
    """Frozen parameters, the model that shares storage, flags, modes and the global generator stay as they were."""
    original = network().eval()
    before = weights(original)
    copy = share_parameters(original)
    copy[3].weight.requires_grad_(False)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    given = task(copy)
    learning = [Group({"first": copy[0].weight})]
    with pytest.raises(ValueError, match="two groups hold the same parameter"):
        fit(Task(learning * 2, EXAMPLES, given.collate, given.loss, copy), RECIPE, tmp_path)
    fit(Task(learning, EXAMPLES, given.collate, given.loss, copy), RECIPE, tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert same(weights(original), before)
    assert not torch.equal(copy[0].weight, before["0.weight"])
    assert torch.equal(copy[3].bias, before["3.bias"])
    assert not copy.training
    assert not copy[2].training
    assert not copy[3].weight.requires_grad
    assert copy[0].bias.requires_grad
    assert all(value.grad is None for value in copy.parameters())


def test_bfloat16_computes_in_half_precision_and_keeps_float32(tmp_path: Path) -> None:
    module = network()
    seen = set()
    module[3].register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    recipe = RECIPE.model_copy(update={"precision": "bfloat16", "steps": 60})
    losses = [row.loss for row in fit(task(module), recipe, tmp_path)]
    assert seen == {torch.bfloat16}
    assert module[0].weight.dtype == torch.float32
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    with pytest.raises(BadInput, match="must be float32"):
        fit(task(network().to(torch.bfloat16)), RECIPE, tmp_path / "half")


def test_a_checkpoint_is_neither_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    fit(task(network()), RECIPE, tmp_path)
    with pytest.raises(BadInput, match="holds an unfinished training"):
        fit(task(network()), RECIPE, tmp_path)
    changed = RECIPE.model_copy(update={"learning_rate": 0.1})
    with pytest.raises(BadInput, match=r"learning_rate = 0\.05, not 0\.1"):
        fit(task(network()), changed, tmp_path, resume=True)
    with pytest.raises(BadInput, match="examples = 23, not 20"):
        fit(task(network(), EXAMPLES[:20]), RECIPE, tmp_path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(BadInput, match="does not hold a checkpoint"):
        fit(task(network()), RECIPE, tmp_path, resume=True)


def test_failures_are_told_and_leave_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = task(network())
    with pytest.raises(BadInput, match="no example"):
        fit(task(network(), []), RECIPE, tmp_path)

    def loss(batch: Any, step: int) -> Loss:
        found = given.loss(batch, step)
        return Loss(found.total * math.nan if step == 7 else found.total, found.terms)

    broken = Task(given.groups, given.examples, given.collate, loss, given.module)
    with pytest.raises(RunFailed, match=r"step 8 .* not finite.*checkpoint: step 5"):
        fit(broken, RECIPE, tmp_path)
    empty = Task(
        given.groups,
        given.examples,
        given.collate,
        lambda b, s: Loss(given.loss(b, s).total, 0),
        given.module,
    )
    with pytest.raises(RunFailed, match="nothing to predict"):
        fit(empty, RECIPE, tmp_path / "empty")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.engines.training.save_file", full)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(RunFailed, match=r"step 10 could not be written.*step 5.*[Nn]o space"):
        fit(task(network()), RECIPE, tmp_path, resume=True)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
