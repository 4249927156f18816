"""ZOO-Prune: sensitivity of the projector times distance."""

from __future__ import annotations

import pytest
import torch
from reference import ARCHITECTURES, load, picture, visual_places
from test_images import look
from torch import nn

import zoo
from zoo.engines.crops import feature_layer
from zoo.engines.images import EncoderWatch
from zoo.engines.views import View
from zoo.errors import Refused
from zoo.methods.visual_tokens.zoo_prune import (
    Projector,
    ZooPrune,
    low_rank,
    projector_inputs,
    sensitivity,
    unit_directions,
)

NONLINEAR = [name for name in ARCHITECTURES if name not in ("tiny-smolvlm", "tiny-idefics3")]


def projector(width: int = 12, seed: int = 0) -> Projector:
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Linear(width, 20), nn.Linear(20, 16)
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.3, generator=generator)
    return Projector(None, layers[0], nn.GELU(), layers[1])


@torch.no_grad()
def by_the_paper(x: torch.Tensor, parts: Projector, directions: torch.Tensor, step: float) -> list[float]:
    """Two calls of the projector per token and direction, in float64."""
    whole = nn.Sequential(parts.first, parts.activation, parts.last).double()
    found = []
    for row in x.double():
        changes = [whole(row + step * u) - whole(row - step * u) for u in directions.double()]
        found.append(sum(float(change.norm()) for change in changes) / (2 * step * len(directions)))
    whole.float()
    return found


@torch.no_grad()
@pytest.mark.parametrize("step", [0.01, 1.0])
def test_sensitivity_is_the_mean_of_finite_differences(step: float) -> None:
    parts = projector()
    generator = torch.Generator().manual_seed(1)
    x, directions = torch.randn(15, 12, generator=generator), unit_directions(9, 12, generator)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(9))
    found = sensitivity(x, parts, directions, step)
    torch.testing.assert_close(
        found, torch.tensor(by_the_paper(x, parts, directions, step)), rtol=1e-4, atol=0
    )


def test_half_precision_weights_are_estimated_in_float32() -> None:
    parts = projector()
    generator = torch.Generator().manual_seed(1)
    x, directions = torch.randn(40, 12, generator=generator).bfloat16(), unit_directions(32, 12, generator)
    half = Projector(None, parts.first.bfloat16(), parts.activation, parts.last.bfloat16())
    found = sensitivity(x, half, directions, 0.01)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, torch.tensor(by_the_paper(x, half, directions, 0.01)), rtol=1e-3, atol=0
    )


def test_picks_maximise_sensitivity_times_distance() -> None:
    generator = torch.Generator().manual_seed(4)
    y, raw = torch.randn(30, 5, generator=generator), torch.rand(30, generator=generator)
    score = ((raw - raw.min()) / (raw.max() - raw.min() + 1e-8)).double()
    distance = 1 - torch.nn.functional.cosine_similarity(y.double()[:, None], y.double()[None], dim=-1)
    picked = [int(score.argmax())]
    while len(picked) < 12:
        gap = {j: float(score[j] * distance[picked, j].min()) for j in range(30) if j not in picked}
        picked.append(max(gap, key=gap.__getitem__))
    assert ZooPrune().order(y, raw, 12).tolist() == picked


def test_sensitive_distinct_tokens_win_and_the_least_sensitive_comes_last() -> None:
    y = torch.eye(10)
    y[3] = y[2]
    raw = torch.linspace(0.1, 0.2, 10)
    raw[[2, 3, 7]] = torch.tensor([1.0, 0.99, 0.9])
    order = ZooPrune().order(y, raw, 10).tolist()
    assert order[:2] == [2, 7]
    assert order[-2:] in ([0, 3], [3, 0])  # no sensitivity, or a copy: a score of 0
    assert not {2, 7} & set(ZooPrune().order(y, -raw, 2).tolist())
    assert ZooPrune().order(y, torch.ones(10), 3).tolist() == [0, 1, 2]  # equal scores: diversity alone


@pytest.mark.parametrize("name", NONLINEAR)
def test_what_is_perturbed_is_what_the_projector_reads(name: str) -> None:
    """Sent through the layers that were found, it gives the model's own visual tokens."""
    loaded = load(name)
    layer, parts = feature_layer(loaded.anatomy), ZooPrune()._projector(loaded.anatomy)

    def see(view: View) -> tuple[torch.Tensor, torch.Tensor]:
        (image,) = view.images
        projected = parts.last(parts.activation(parts.first(projector_inputs(image, parts, layer))))
        made = projected if projected.dim() == 2 else image.on_tokens(projected)
        whole = image.crop >= 0
        return made[whole], view.tokens[image.tokens[whole]]

    data = dict(loaded.processor(text=["<image> What?"], images=[picture(1, 96, 96)], return_tensors="pt"))
    ((made, tokens),) = look(loaded, data, see, observes_encoder=(EncoderWatch(layer, False, True),))
    torch.testing.assert_close(made, tokens, rtol=1e-4, atol=1e-5)


def test_views_are_pruned_apart_and_newlines_stay_on_top() -> None:
    loaded = load("tiny-llava-next")
    # 96 x 96 fills two by two tiles: five views of 36 tokens, and one newline for each of 12 rows.
    data = loaded.processor(text=["<image> What?"], images=[picture(1, 96, 96)], return_tensors="pt")
    with torch.no_grad(), zoo.method("zoo-prune", keep_ratio=0.2).apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[-1][0] - visual_places(loaded, data["input_ids"][0])[0]
    row, column = (kept - 36).div(13, rounding_mode="floor"), (kept - 36) % 13
    view = torch.where(kept < 36, 0, 1 + 2 * (row >= 6) + (column >= 6))
    view[(kept >= 36) & (column == 12)] = -1
    counts = [int((view == number).sum()) for number in range(-1, 5)]
    assert counts == [12, *[int(int(0.2 * 180) / 5)] * 5]
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    loaded = load("tiny-llava")
    data = loaded.processor(text=["<image> What?"], images=[picture(1)], return_tensors="pt")
    kept = []
    for seed, state in ((0, 1), (0, 2), (1, 1), (2, 1), (3, 1)):
        torch.manual_seed(state)
        method = zoo.method("zoo-prune", keep_ratio=0.4, directions=1, seed=seed)
        with torch.no_grad(), method.apply(loaded) as applied:
            applied(**data)
            kept.append(applied.kept[-1][0].tolist())
    assert kept[0] == kept[1]
    assert any(other != kept[0] for other in kept[2:])


@torch.no_grad()
def test_a_low_rank_keeps_the_long_directions() -> None:
    generator = torch.Generator().manual_seed(7)
    layer = nn.Linear(60, 50)
    layer.weight.copy_(torch.randn(50, 6, generator=generator) @ torch.randn(6, 60, generator=generator))
    x = torch.randn(20, 60, generator=generator)
    narrow = low_rank(layer, 6, seed=0)
    torch.testing.assert_close(
        narrow(x).norm(dim=-1), (x @ layer.weight.T).norm(dim=-1), rtol=1e-4, atol=1e-4
    )
    assert bool(((x @ layer.weight.T).norm(dim=-1) > low_rank(layer, 3, seed=0)(x).norm(dim=-1)).all())
    loaded = load("tiny-llava")
    data = loaded.processor(text=["<image> What?"], images=[picture(1)], return_tensors="pt")
    kept = []
    for rank in (None, 64):  # 64 is the full rank here
        with zoo.method("zoo-prune", keep_ratio=0.3, rank=rank).apply(loaded) as applied:
            applied(**data)
            kept.append(applied.kept[-1][0].tolist())
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["tiny-smolvlm", "tiny-idefics3"])
def test_a_linear_projector_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(Refused, match="a projector of two linear layers") as caught:
        zoo.method("zoo-prune").apply(load(name))
    assert "\n" not in str(caught.value)
