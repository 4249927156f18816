"""ShortGPT: both criteria against the hidden states that transformers returns, and planted layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from depth import decoder_of, ids, loaded, scale_layer

from zoo.methods.weights.shortgpt import ShortGpt


@torch.no_grad()
def hidden_states(model: object, windows: torch.Tensor) -> list[torch.Tensor]:
    return list(model(input_ids=windows, output_hidden_states=True).hidden_states)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
def test_block_influence_is_that_of_the_hidden_states(name: str) -> None:
    model, windows = loaded(name), ids(5, 20)
    expected = torch.zeros(4)
    for piece in (windows[:, :8], windows[:, 8:16], windows[:, 16:]):
        states = hidden_states(model.model, piece)
        for index, (before, after) in enumerate(pairwise(states)):
            expected[index] += (1 - torch.cosine_similarity(before, after, dim=-1)).sum()
    found = ShortGpt(stride=8).importance(decoder_of(model), windows)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_the_last_layer_can_be_taken_before_the_final_norm() -> None:
    model, windows = loaded(), ids()
    decoder = decoder_of(model)
    seen: list[torch.Tensor] = []
    hook = decoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = hidden_states(model.model, windows)
    hook.remove()
    raw = ShortGpt(final_norm=False).importance(decoder, windows)
    behind = ShortGpt().importance(decoder, windows)
    expected = (1 - torch.cosine_similarity(states[-2], seen[0], dim=-1)).sum()
    assert float(raw[-1]) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(raw[:-1], behind[:-1])
    assert raw[-1] != behind[-1]


@pytest.mark.parametrize("run", [1, 2, 3])
def test_angular_distance_is_that_of_the_last_tokens(run: int) -> None:
    model, windows = loaded(), ids()
    last = [state[:, -1] for state in hidden_states(model.model, windows)]
    expected = [
        (torch.cosine_similarity(last[start], last[start + run]).arccos() / torch.pi).sum()
        for start in range(5 - run)
    ]
    found = ShortGpt().distances(decoder_of(model), windows, run, batch=2)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    chosen = ShortGpt(criterion="angular", layers=run).apply(model, calibration=windows).report
    start = min(range(5 - run), key=lambda place: float(expected[place]))
    assert chosen.facts["removed"] == ", ".join(f"layer {index}" for index in range(start, start + run))


@pytest.mark.parametrize("criterion", ["block-influence", "angular"])
def test_a_useless_layer_leaves_and_an_important_one_stays(criterion: str) -> None:
    model = loaded()
    scale_layer(model, 1, 0.0)
    scale_layer(model, 2, 10.0)
    method = ShortGpt(layers=1, criterion=criterion)
    applied = method.apply(model, calibration=ids())
    assert applied.report.facts["removed"] == "layer 1"
    with torch.no_grad():  # nothing is lost with a layer that did nothing
        torch.testing.assert_close(applied(input_ids=ids()).logits, model.model(input_ids=ids()).logits)
    two = ShortGpt(layers=2).apply(model, calibration=ids()).report.facts["removed"]
    assert "layer 2" not in str(two)


def test_half_precision_is_compared_in_float32() -> None:
    model = loaded()
    exact = ShortGpt().importance(decoder_of(model), ids())
    model.model.to(torch.bfloat16)
    rounded = ShortGpt().importance(decoder_of(model), ids())
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.0)
