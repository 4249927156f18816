"""The curve: interpolation, measuring with a clock of our own, and the file it is kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import build

from zoo.engines import verification_cost as engine
from zoo.engines.verification_cost import VerificationCost, measure, verification_cost

COST = VerificationCost((1, 2, 4), (100, 300), ((1.0, 1.5, 2.5), (2.0, 3.0, 5.0)))


@pytest.mark.parametrize(
    ("width", "context", "seconds"),
    [
        (1, 100, 1.0),
        (3, 100, 2.0),
        (2, 200, 2.25),
        (4, 300, 5.0),
        (6, 100, 3.5),  # the last slope goes on
        (1, 10, 1.0),  # a shorter context is no cheaper than the shortest measured
        (1, 500, 3.0),
        (6, 500, 10.5),
    ],
)
def test_interpolation(width: int, context: int, seconds: float) -> None:
    assert COST(width, context) == pytest.approx(seconds)


class Clock:
    """Time passes only in forward passes: a second per pass and a tenth per new position."""

    def __init__(self, model: Any) -> None:
        self.now = 0.0
        self.widths: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self.tick, with_kwargs=True)

    def tick(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        width = kwargs["input_ids"].shape[1]
        self.now += 1 + width / 10
        self.widths.append((width, kwargs["past_key_values"].get_seq_length()))

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("kind", ["gqa", "sliding"])
def test_passes_are_timed_behind_a_full_cache(kind: str) -> None:
    model = build(kind).model
    clock = Clock(model)
    cost = measure(model, widths=(1, 4, 9), contexts=(50, 200), clock=clock)
    assert cost.widths == (1, 4, 9)
    for row in cost.seconds:
        assert row == pytest.approx((1.1, 1.4, 1.9))
    if kind == "gqa":
        assert cost.contexts == (50, 200)
        assert {past for _, past in clock.widths} == {0, 50, 200}


def test_contexts_beyond_the_models_positions_are_left_out() -> None:
    cost = measure(build(max_position_embeddings=80).model, widths=(1, 2), contexts=(64, 1024))
    assert cost.contexts == (64,)
    cost = measure(build(max_position_embeddings=40).model, widths=(1, 2), contexts=(64, 1024))
    assert cost.contexts == (19,)


def test_a_slow_model_is_measured_once_per_width() -> None:
    model = build().model
    clock = Clock(model)
    widths = (*range(1, 9), 20, 30)
    cost = measure(model, widths=widths, contexts=(50,), clock=clock)
    assert [width for width, _ in clock.widths] == [32, 1, *range(1, 9)]  # filling, warming up, half a round
    assert cost.widths == tuple(range(1, 9))
    assert cost(20, 50) == pytest.approx(1 + 20 / 10)


def test_the_curve_is_kept_for_the_same_model_and_refreshed_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    calls: list[Any] = []
    monkeypatch.setattr(engine, "measure", lambda model: calls.append(model) or COST)
    assert verification_cost(build(seed=0).model) == COST
    assert verification_cost(build(seed=1).model) == COST, "other weights cost the same"
    assert len(calls) == 1
    verification_cost(build(seed=0).model, refresh=True)
    assert len(calls) == 2
    verification_cost(build("mha").model)
    verification_cost(build(dtype=torch.bfloat16).model)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    verification_cost(build().model)
    torch.set_num_threads(threads)
    assert len(calls) == 5
    files = list((tmp_path / "verification-cost").iterdir())
    assert len(files) == 4
    assert json.loads(files[0].read_text())["of"]["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("content", ["", "[]", '{"widths": [1]}', '{"seconds": [["x"]]}'])
def test_a_spoiled_file_is_measured_anew(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "measure", lambda model: COST)
    model = build().model
    verification_cost(model)
    (file,) = (tmp_path / "verification-cost").iterdir()
    file.write_text(content)
    assert verification_cost(model) == COST
    assert json.loads(file.read_text())["widths"] == [1, 2, 4]


def test_where_nothing_can_be_written_it_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ZOO_HOME", str(blocked))
    monkeypatch.setattr(engine, "measure", lambda model: COST)
    assert verification_cost(build().model) == COST
