"""VFlowOpt: importance, recycling and budget against slow references; the search for its knobs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from reference import ARCHITECTURES, VIDEO, cast, clip, load, picture, visual_places
from torch.nn.functional import cosine_similarity

from zoo.engines.bayesian import Search
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import BadInput
from zoo.methods.visual_tokens._patch_importance import global_attention, patch_entropy
from zoo.methods.visual_tokens._recycling import cells, count_low, recycle
from zoo.methods.visual_tokens._vflowopt_search import final_state, normalisation
from zoo.methods.visual_tokens.vflowopt import PLANS, VFlowOpt, last_share, most
from zoo.models import LoadedModel


def prompt(loaded: LoadedModel) -> dict[str, Any]:
    texts = ["<image>\nWhat is it?", "Now <image>, and what is this?", "A <image> b <image>"]
    images = [picture(0), picture(1, 60, 90), picture(2, 48, 48), picture(3)]
    return dict(loaded.processor(text=texts, images=images, return_tensors="pt", padding=True))


def look(loaded: LoadedModel, data: dict[str, Any], see: Any, layer: int = -1) -> list[Any]:
    """What ``see`` returns for each sample, at a stage that keeps everything."""
    found = []

    def reduce(view: View) -> Keep:
        found.append(see(view))
        return Keep(torch.arange(len(view.tokens)).unsqueeze(0))

    stage = Stage(-1, reduce, observes_encoder=(EncoderWatch(layer),))
    reducer = TokenReducer(loaded.anatomy, [stage], "keep", "test")
    try:
        with torch.no_grad():
            loaded.model(**data)
    finally:
        reducer.close()
    return found


# --- the map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.8, 1.3, 30.0])
def test_global_patches_speak_for_their_crop(threshold: float) -> None:
    maps = (3 * torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(0))).softmax(-1)
    found = global_attention(maps.mean(1), lambda rows: maps[:, rows], threshold)
    for crop, one in enumerate(maps):
        received = one.mean(0)
        chosen = [i for i in range(20) if received[i] > threshold / 20]
        expected = one[chosen].mean(0) if chosen else received
        torch.testing.assert_close(found[crop], expected)


def test_entropy_counts_grey_values() -> None:
    pixels = torch.randint(0, 256, (5, 3, 49), generator=torch.Generator().manual_seed(0))
    pixels[0] = 7
    for patch, found in zip(pixels, patch_entropy(pixels).tolist(), strict=True):
        grey = Counter(round(0.3333 * int(sum(colour))) for colour in patch.T)
        assert found == pytest.approx(-sum(n / 49 * math.log2(n / 49) for n in grey.values()), abs=1e-5)


def test_importance_is_that_of_eager_attention() -> None:
    """SigLIP tiles of LLaVA-OneVision; the picture has newlines, which get 1."""
    loaded = load("tiny-llava-onevision")
    method = VFlowOpt(threshold=1.02)
    data = dict(loaded.processor(text="<image> what?", images=[picture(1, 60, 90)], return_tensors="pt"))
    ((importance, image),) = look(
        loaded, data, lambda view: (method.importance(view.images[0], -1, 1.02), view.images[0])
    )
    loaded.model.set_attn_implementation("eager")
    seen: list[torch.Tensor] = []
    assert loaded.anatomy.encoder is not None
    block = loaded.anatomy.encoder.blocks[-1].attention.module
    hook = block.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with torch.no_grad():
        loaded.model(**data)
    hook.remove()
    expected = []
    for one in seen[0].mean(1):
        received = one.mean(0)
        chosen = received > 1.02 * received.mean()
        assert 0 < int(chosen.sum()) < len(received)
        expected.append(one[chosen].mean(0))
    flat = torch.cat(expected)
    for token in range(len(importance)):
        patches = image.patches[token]
        wanted = flat[patches[patches >= 0]].mean() if patches[0] >= 0 else torch.tensor(1.0)
        torch.testing.assert_close(importance[token], wanted, rtol=0, atol=1e-6)
    assert bool(image.newline.any())


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_pixels_are_those_of_the_picture(name: str) -> None:
    """A picture of one grey has patches of that value, however the processor normalises."""
    from PIL import Image

    loaded = load(name)
    method = VFlowOpt(entropy_weight=0.5, **normalisation(loaded))
    flat = Image.new("RGB", (48, 48), (40, 120, 200))
    data = dict(loaded.processor(text="<image> what?", images=[flat], return_tensors="pt"))
    ((pixels, importance),) = look(
        loaded,
        data,
        lambda view: (method.pixels(view.images[0]), method.importance(view.images[0], -1, 1.0)),
    )
    assert pixels.unique(dim=-1).shape[-1] == 1
    assert pixels[0, 0, :, 0].tolist() == [40, 120, 200]
    assert bool(importance.isfinite().all())


# --- recycling --------------------------------------------------------------------------------------------------


def slow_recycle(
    x: torch.Tensor, importance: torch.Tensor, key: list[Any], low: int
) -> dict[int, torch.Tensor]:
    order = sorted(range(len(x)), key=lambda i: (float(importance[i]), i))
    kept = {i: x[i] for i in order[low:]}
    groups: dict[Any, list[int]] = {}
    for i in sorted(order[:low]):
        groups.setdefault(key[i], []).append(i)
    for members in groups.values():
        weights = importance[members] / importance[members].sum()
        strongest = max(members, key=lambda i: float(importance[i]))
        kept[strongest] = (weights.unsqueeze(1) * x[members]).sum(0)
    return dict(sorted(kept.items()))


@pytest.mark.parametrize("low", [0, 1, 30, 47, 60])
def test_recycling_equals_a_loop_over_cells(low: int) -> None:
    generator = torch.Generator().manual_seed(low)
    x, importance = torch.randn(60, 5, generator=generator), torch.rand(60, generator=generator)
    importance[10:14] = importance[10]  # equals
    place = torch.cartesian_prod(torch.arange(6), torch.arange(10))
    part = (torch.arange(60) >= 30).long()
    cell = (place / 2.6).floor().long()
    join = recycle(importance, part, cell, low)
    key = list(zip(part.tolist(), *cell.T.tolist(), strict=True))
    expected = slow_recycle(x, importance, key, low)
    assert join.anchor[0].tolist() == list(expected)
    torch.testing.assert_close(join.apply(x.unsqueeze(0))[0], torch.stack(list(expected.values())))


def test_cells_without_importance_are_averaged() -> None:
    join = recycle(torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3).long(), torch.zeros(3, 2).long(), 2)
    assert join.apply(torch.tensor([[[2.0], [4.0], [9.0]]])).tolist() == [[[3.0], [9.0]]]


def test_newlines_stand_at_the_end_of_their_row() -> None:
    loaded = load("tiny-llava-next")
    data = dict(loaded.processor(text="<image> what?", images=[picture(1, 60, 90)], return_tensors="pt"))
    ((part, place, image),) = look(
        loaded, data, lambda view: (*cells(view.images[0], 1.0), view.images[0]), layer=-2
    )
    rows, columns = image.parts[1].grid
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns + 1))
    assert torch.equal(place[part == 1], expected)
    assert torch.equal(image.newline[part == 1], expected[:, 1] == columns)


# --- the method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_cuts_by_one_map(name: str, dtype: torch.dtype) -> None:
    loaded = load(name, dtype)
    data = cast(prompt(loaded), dtype)
    # A second picture in a sample: cut without recycling.
    method = VFlowOpt(threshold=1.1, cell=3.0, first_share=0.5, second_share=0.7, third_share=0.6)
    with method.apply(loaded) as applied:
        applied.generate(**data, max_new_tokens=3, do_sample=False)
        first, second, third = (applied.kept[layer] for layer in (-1, 1, 3))
    for sample, ids in enumerate(data["input_ids"]):
        total = len(visual_places(loaded, ids))
        if sample < 2:
            low = count_low(total, 0.5, 3.0)
            assert total - low < len(first[sample]) <= total
        n = len(first[sample])
        assert len(second[sample]) == n - round(n * (1 - 0.7))
        n = len(second[sample])
        assert len(third[sample]) == n - round(n * (1 - 0.6))
        assert set(third[sample].tolist()) <= set(second[sample].tolist()) <= set(first[sample].tolist())
        for kept in (first, second, third):
            assert torch.equal(kept[sample], kept[sample].sort().values)


@pytest.mark.parametrize("name", VIDEO)
def test_videos_are_cut_without_recycling(name: str) -> None:
    loaded = load(name)
    data = dict(loaded.processor(text=["<video> a", "b <video> what?"], videos=[clip(1), clip(2)]))
    # Where the architecture shows frames as pictures, each is cut by itself.
    pieces = 3 if name in ("tiny-smolvlm", "tiny-internvl") else 1
    with VFlowOpt(first_share=0.4, third_share=1.0).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        kept = applied.kept[-1]
    for sample, ids in enumerate(data["input_ids"]):
        each = len(visual_places(loaded, ids)) // pieces
        assert len(kept[sample]) == pieces * (each - round(each * 0.6))


def test_important_tokens_stay_in_every_cut() -> None:
    importance = torch.full((20,), 0.1)
    importance[[2, 7, 11, 19]] = 1.0
    assert sorted(most(importance, 0.2).tolist()) == [2, 7, 11, 19]
    join = recycle(importance, torch.zeros(20).long(), torch.zeros(20, 2).long(), 16)
    assert set(join.anchor[0].tolist()) >= {2, 7, 11, 19}
    assert join.length == 5


@pytest.mark.parametrize(("mean", "plan"), PLANS.items())
def test_presets_meet_their_budget(mean: float, plan: Any) -> None:
    method = VFlowOpt(keep_ratio=mean)
    assert method.plan(1000, (9, 9, 10)) == plan
    r0, r1, r2 = plan.shares
    assert (9 * r0 + 9 * r0 * r1 + 10 * r0 * r1 * r2) / 28 == pytest.approx(mean, abs=2e-3)


@pytest.mark.parametrize("mean", [0.05, 0.2, 0.33, 0.6])
def test_other_budgets_are_met_by_the_third_share(mean: float) -> None:
    for method in (VFlowOpt(keep_ratio=mean), VFlowOpt(keep_tokens=round(1000 * mean))):
        r0, r1, r2 = method.plan(1000, (9, 9, 10)).shares
        assert (9 * r0 + 9 * r0 * r1 + 10 * r0 * r1 * r2) / 28 == pytest.approx(mean)
    with pytest.raises(BadInput, match="first_share"):
        last_share(0.1, 0.9, 1.0, (9, 9, 10))


def test_keeping_everything_changes_no_bit() -> None:
    loaded = load("tiny-llava-onevision")
    data = prompt(loaded)
    with torch.no_grad():
        dense = loaded.model(**data).logits
        with VFlowOpt(keep_ratio=1.0).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)


# --- the search -------------------------------------------------------------------------------------------------


def bowl(point: tuple[float, ...]) -> float:
    return (point[0] - 1.3) ** 2 + 0.5 * (point[1] + 2) ** 2 + 0.3 * math.sin(3 * point[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimiser_beats_random_points(seed: int) -> None:
    guided = Search([(-5, 5), (-5, 5)], 6, seed)
    blind = Search([(-5, 5), (-5, 5)], 200, seed)
    for search, calls in ((guided, 22), (blind, 100)):
        for _ in range(calls):
            point = search.ask()
            assert all(-5 <= knob <= 5 for knob in point)
            search.tell(bowl(point))
    assert min(guided.values) < min(blind.values)
    assert bowl(guided.best) == min(guided.values)


def test_the_search_finds_what_changes_the_last_state_least() -> None:
    loaded = load("tiny-llava")
    samples = [
        dict(loaded.processor(text=f"<image>\n{text}", images=[picture(seed)], return_tensors="pt"))
        for seed, text in enumerate(("What is it?", "Where?"))
    ]
    found = VFlowOpt.fit(loaded, samples, keep_ratio=0.5, calls=5, initial=3, seed=1)
    again = VFlowOpt.fit(loaded, samples, keep_ratio=0.5, calls=5, initial=3, seed=1)
    assert found == again
    assert found.keep_ratio == 0.5
    assert found.pixel_mean == normalisation(loaded)["pixel_mean"]

    def agreement(method: VFlowOpt) -> float:
        full = [final_state(loaded, inputs) for inputs in samples]
        with method.apply(loaded):
            return sum(
                float(cosine_similarity(h, final_state(loaded, inputs)))
                for h, inputs in zip(full, samples, strict=True)
            )

    one = VFlowOpt.fit(loaded, samples, keep_ratio=0.5, calls=1, initial=3, seed=1)
    assert agreement(found) >= agreement(one)
    with pytest.raises(BadInput, match="0 samples"):
        VFlowOpt.fit(loaded, [])
