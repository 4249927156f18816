"""The measuring functions, against figures that are known by hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from zoo.bench.environment import environment
from zoo.bench.flops import count_flops
from zoo.bench.memory import bytes_per_decode_step, cache_bytes, parameter_bytes
from zoo.bench.quality import common_prefix, language_quality, next_token_divergence
from zoo.bench.record import Figure, RunRecord, compare
from zoo.bench.session import Arm, Session
from zoo.bench.settings import Settings
from zoo.bench.timing import TimingInterrupted, alternate, ready, steady, summarise
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_attention_is_counted(causal: bool, kv_heads: int) -> None:
    query = torch.randn(2, 4, 32, 16)
    key = torch.randn(2, kv_heads, 32, 16)
    counted = count_flops(
        lambda: F.scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=kv_heads < 4)
    )
    assert counted == 2 * (2 * 2 * 4 * 32 * 32 * 16)


def test_flops_of_a_model_fall_with_its_layers() -> None:
    ids = torch.arange(16).unsqueeze(0)
    flops = [
        count_flops(lambda layers=layers: tiny_model("tiny-llama", num_hidden_layers=layers)[0](ids))
        for layers in (1, 2, 3)
    ]
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0


def test_rounds_alternate_and_setup_is_not_timed() -> None:
    calls: list[str] = []

    @contextmanager
    def version(name: str):
        deadline = time.process_time() + 0.05
        while time.process_time() < deadline:
            pass
        yield lambda: calls.append(name)

    samples = alternate({"a": lambda: version("a"), "b": lambda: version("b")}, CPU, repeats=3)
    assert calls == ["a", "b"] * 4  # one round of warm-up
    assert all(len(sample.seconds) == 3 and max(sample.seconds) < 0.02 for sample in samples.values())


def test_time_limit_still_makes_three_rounds() -> None:
    samples = alternate({"a": ready(lambda: None)}, CPU, repeats=50, seconds=0)
    assert len(samples["a"].seconds) == 3


def test_interrupt_keeps_complete_rounds() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    with pytest.raises(TimingInterrupted) as caught:
        alternate({"a": ready(work), "b": ready(work)}, CPU, repeats=9)
    assert [len(sample.seconds) for sample in caught.value.samples.values()] == [2, 2]


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    seen = []

    def broken() -> None:
        seen.append(torch.get_num_threads())
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), steady(CPU):
        broken()
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_spread_is_half_the_quartile_distance() -> None:
    figure = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (figure.median, figure.spread, figure.n) == (3.0, 1.0, 5)
    assert summarise([1.0, 2.0]).spread is None


def test_gain_points_in_the_good_direction() -> None:
    slow, fast = Figure(median=2.0), Figure(median=1.0)
    assert compare("prefill-time", slow, fast).gain == 2
    assert compare("decode-speed", fast, slow).gain == 2
    assert compare("agreement", None, fast).gain is None
    row = compare("prefill-time", slow, fast, bound=4.0)
    assert row.efficiency == 0.5
    assert not row.suspect


def test_gain_above_its_bound_is_suspect_only_beyond_noise() -> None:
    dense, steady_, noisy = Figure(median=2.0), Figure(median=1.0), Figure(median=1.0, spread=0.5, n=5)
    assert compare("prefill-time", dense, steady_, bound=1.5).suspect
    assert not compare("prefill-time", dense, noisy, bound=1.5).suspect


def test_figures_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Figure(median=math.inf)


def test_quality_of_a_model_against_itself_and_against_another() -> None:
    model, _ = tiny_model("tiny-llama")
    other, _ = tiny_model("tiny-llama", seed=1)
    windows = torch.randint(4, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    same = language_quality(model, model, windows)
    assert (same.agreement, same.tokens, same.windows) == (1.0, 33, 3)
    assert same.kl == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        expected = float(model(input_ids=windows, labels=windows).loss)
    assert same.dense_loss == pytest.approx(expected, rel=1e-5)
    different = language_quality(model, other, windows)
    assert different.kl > 0.1
    assert different.dense_perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_divergence_by_hand() -> None:
    dense, method = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    same, kl = next_token_divergence(dense, method)
    assert same == 0  # the tie goes to the first token, the dense model prefers the second
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


@pytest.mark.parametrize(
    ("a", "b", "length"), [([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0), ([1, 2], [1, 2], 2)]
)
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == length


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_bytes_read_per_step(name: str) -> None:
    """Untied embeddings leave one row to read; tied ones are read whole, as the head."""
    model, processor = tiny_model(name)
    decoder = LoadedModel(model, processor).anatomy.decoder
    assert decoder is not None
    table = parameter_bytes(decoder.embed)
    row = decoder.embed.embedding_dim * 4
    tied = decoder.head is not None and decoder.head.weight is decoder.embed.weight
    assert bytes_per_decode_step(decoder) == parameter_bytes(model) + row - (0 if tied else table)


def test_cache_is_measured_layer_by_layer() -> None:
    model, _ = tiny_model("tiny-llama")
    cache = model(input_ids=torch.arange(10).unsqueeze(0), use_cache=True).past_key_values
    assert (
        cache_bytes(cache) == [2 * 2 * 16 * 10 * 4] * 4
    )  # keys and values, 2 KV heads of 16, 10 tokens, fp32


def test_environment_is_json_and_names_the_hardware() -> None:
    import json

    facts = environment("cpu", "sdpa")
    assert facts["hardware"]
    assert facts["packages"]["torch"] == torch.__version__
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


@pytest.mark.parametrize(("device", "passes"), [("cuda", 2), ("cpu", 0)])
def test_peak_memory_is_compared_where_the_device_counts_it(
    monkeypatch: pytest.MonkeyPatch, device: str, passes: int
) -> None:
    outputs = []

    def peak(_: torch.device, work: Callable[[], Any]) -> int:
        outputs.append(work())
        return 6_000_000 // len(outputs)

    monkeypatch.setattr("zoo.bench.session.peak_bytes", peak)
    record = RunRecord.model_construct(comparisons=[])
    session = Session(record, Settings(), torch.device(device), lambda *_: None)
    model, processor = tiny_model("tiny-llama")
    arms = {name: Arm(LoadedModel(model, processor, "tiny-llama")) for name in ("dense", "method")}
    session.add_peak_memory(arms, {"input_ids": torch.arange(8).unsqueeze(0)}, "8 tokens")
    assert len(outputs) == passes
    figures = [(row.quantity, row.dense.median, row.method.median) for row in record.comparisons]
    assert figures == ([("peak-memory", 6.0, 3.0)] if passes else [])
