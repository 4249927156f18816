"""EntropyPrune: matrix entropy of each visual token's queries."""

from __future__ import annotations

import math

import pytest
import torch
from reference import load, picture, visual_places

import zoo
from zoo.errors import BadInput, Refused
from zoo.methods.visual_tokens.entropyprune import EntropyPrune, count_for_average, token_entropy


def by_the_paper(states: torch.Tensor, trace_normalise: bool = False) -> list[float]:
    """From the covariance over dimensions, token by token; its zero eigenvalues contribute nothing."""
    heads, tokens, _ = states.shape
    found = []
    for token in range(tokens):
        rows = states[:, token].double()
        rows = rows - rows.mean(0)
        covariance = rows.T @ rows / heads
        if trace_normalise:
            covariance = covariance / covariance.trace()
        spectrum = [float(value) for value in torch.linalg.eigvalsh(covariance) if value > 1e-9]
        found.append(-sum(value * math.log(value) for value in spectrum) / math.log(heads))
    return found


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(8, 20, 16), (4, 9, 3), (2, 5, 8)])
def test_entropy_is_that_of_the_covariance(shape: tuple[int, int, int], normalise: bool) -> None:
    states = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    expected = torch.tensor(by_the_paper(states, normalise), dtype=torch.float64)
    torch.testing.assert_close(token_entropy(states, normalise), expected, rtol=1e-5, atol=1e-7)


def test_a_rotation_common_to_all_heads_changes_nothing() -> None:
    """So queries before and after the rotary embedding give the same entropy."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(6, 7, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    torch.testing.assert_close(token_entropy(states @ rotation), token_entropy(states), rtol=1e-5, atol=1e-6)


def test_tokens_whose_heads_differ_stay_and_those_whose_heads_agree_go() -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(1, 30, 16, generator=generator).repeat(8, 1, 1)  # all heads agree: entropy 0
    rich = [3, 11, 20]
    states[:, rich] += 0.3 * torch.randn(8, 3, 16, generator=generator)
    entropy = token_entropy(states)
    method = EntropyPrune(keep_tokens=3)
    assert sorted(method.order(entropy, 3).tolist()) == rich
    assert not set(rich) & set(method.order(-entropy, 3).tolist())


def test_the_count_makes_the_average_over_layers() -> None:
    assert [count_for_average(average, 576, 2, 32) for average in (192, 128, 64)] == [166, 98, 29]
    method = EntropyPrune(average_tokens=192)
    assert method.budget(576, 32) == 166
    assert EntropyPrune().budget(576, 32) == 166


@pytest.mark.parametrize(("average", "line"), [(30, "cannot be met"), (700, "only 576 visual tokens")])
def test_an_average_that_cannot_be_met_is_refused(average: float, line: str) -> None:
    with pytest.raises(BadInput, match=line):
        EntropyPrune(average_tokens=average).budget(576, 32)


def test_a_single_head_is_refused() -> None:
    loaded = load("tiny-llava")
    attention = loaded.anatomy.decoder.layers[0].attention
    method = EntropyPrune()
    method.check(loaded)
    attention.module.q_proj = torch.nn.Linear(64, attention.head_dim)
    with pytest.raises(Refused, match="at least two attention heads"):
        method.check(loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_a_model_keeps_what_its_own_queries_say(name: str, dtype: torch.dtype) -> None:
    """Queries by hand, before the rotary embedding; grouped-query decoders have all of them."""
    loaded = load(name, dtype)
    data = loaded.processor(text=["Look: <image> What?"], images=[picture(1)], return_tensors="pt")
    data = {key: value.to(dtype) if value.is_floating_point() else value for key, value in data.items()}
    with torch.no_grad(), zoo.method("entropyprune", keep_tokens=4).apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[2][0].tolist()
    with torch.no_grad():
        states = loaded.model(**data, output_hidden_states=True).hidden_states[1]
    layer = loaded.anatomy.decoder.layers[1]
    places = visual_places(loaded, data["input_ids"][0])
    with torch.no_grad():
        queries = layer.attention.query(layer.input_norm(states))[0, places]
    queries = queries.view(len(places), -1, layer.attention.head_dim).transpose(0, 1)
    entropy = torch.tensor(by_the_paper(queries))
    if dtype == torch.float32:
        assert kept == sorted(places[entropy.topk(4).indices].tolist())
    else:  # the rotary embedding rounds: what is kept may differ only among near ties
        scores = dict(zip(places.tolist(), entropy.tolist(), strict=True))
        worst = float(entropy.topk(4).values[-1])
        assert min(scores[place] for place in kept) >= worst - 0.02 * abs(worst)
    assert kept == sorted(kept)


def test_keys_of_grouped_heads_are_repeated() -> None:
    loaded = load("tiny-llava")
    attention = loaded.anatomy.decoder.layers[1].attention
    assert attention.group > 1
    data = loaded.processor(text=["<image> What?"], images=[picture(1)], return_tensors="pt")
    for states in ("key", "value"):
        method = zoo.method("entropyprune", keep_ratio=0.25, states=states)
        with torch.no_grad(), method.apply(loaded) as applied:
            applied(**data)
            assert len(applied.kept[2][0]) == 9
