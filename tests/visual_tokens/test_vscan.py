"""VScan against loops over windows and tokens, and against the attention that the next layer pays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import load, picture, visual_places

import zoo
from zoo.engines.probes import tap_attention
from zoo.methods.visual_tokens.vscan import VScan, best_of_groups, most_similar

OPTIONS: dict[str, Any] = {"keep_ratio": 0.4, "shallow_layer": 0, "window": 3}


def grid(rows: int, columns: int) -> torch.Tensor:
    return torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(
        0, 1
    )


def plain_scan(
    shallow: torch.Tensor, deep: torch.Tensor, rows: int, columns: int, window: int, count: int
) -> list[int]:
    windows = math.ceil(rows / window) * math.ceil(columns / window)
    local = int(count * 0.5)
    kept: set[int] = set()
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            cells = [
                row * columns + column
                for row in range(top, min(top + window, rows))
                for column in range(left, min(left + window, columns))
            ]
            kept |= set(sorted(cells, key=lambda i: -float(shallow[i]))[: local // windows])
    others = sorted((i for i in range(rows * columns) if i not in kept), key=lambda i: -float(deep[i]))
    return sorted(kept | set(others[: count - local]))


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (7, 10), (4, 4)])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_the_scan_equals_loops_over_windows(rows: int, columns: int, count: int) -> None:
    generator = torch.Generator().manual_seed(rows + count)
    shallow, deep = torch.rand(2, rows * columns, generator=generator)
    kept = VScan(window=4).scanned(shallow, deep, grid(rows, columns), count)
    assert kept.nonzero().squeeze(-1).tolist() == plain_scan(shallow, deep, rows, columns, 4, count)


def test_groups_with_few_members_give_what_they_have() -> None:
    scores, group = torch.tensor([5.0, 1, 4, 2, 3]), torch.tensor([0, 1, 0, 0, 1])
    assert best_of_groups(scores, group, 1).tolist() == [True, False, False, False, True]
    assert best_of_groups(scores, group, 9).all()
    assert not best_of_groups(scores, group, 0).any()


def test_others_join_their_likeness() -> None:
    base = torch.eye(3, 8)
    tokens = torch.cat((base, 5 * base[[2, 0, 1, 1]]))
    kept = torch.tensor([True] * 3 + [False] * 4)
    assert most_similar(tokens, kept).tolist() == [2, 0, 1, 1]


def test_attended_patches_beat_the_others() -> None:
    """A hot patch in every window of the shallow layer, and a hot corner in the deep one."""
    generator = torch.Generator().manual_seed(2)
    shallow, deep = 0.01 * torch.rand(2, 144, generator=generator)
    place = grid(12, 12)
    shallow[(place % 4 == 1).all(1)] = 1
    corner = (place < 3).all(1) & ~(place % 4 == 1).all(1)
    deep[corner] = 1
    kept = VScan(window=4).scanned(shallow, deep, place, 18)
    assert kept[(place % 4 == 1).all(1)].all()
    assert int(kept[corner].sum()) == 8
    inverted = VScan(window=4).scanned(-shallow, -deep, place, 18)
    assert shallow[kept].sum() + deep[kept].sum() > shallow[inverted].sum() + deep[inverted].sum()


def test_the_budget_is_the_mean_over_layers() -> None:
    assert VScan().counts(576, 0.5) == (96, 32)  # the paper's 64 on average
    assert VScan(keep_tokens=64).counts(576, 0.5) == (96, 32)
    assert VScan(keep_ratio=0.8).counts(100, 0.5) == (100, 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inside_the_llm_the_tokens_that_the_coming_layer_looks_at_stay(dtype: torch.dtype) -> None:
    """Against the row that the layer really computes when the second cut is left out."""
    loaded = load("tiny-llava", dtype)
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    texts = ["<image>\nwhat?", "<image>\na longer question", "so <image>\nis it?"]
    data = loaded.processor(
        images=[picture(s) for s in range(3)], text=texts, return_tensors="pt", padding=True
    )
    data["pixel_values"] = data["pixel_values"].to(dtype)
    with torch.no_grad():
        with zoo.method("vscan", **OPTIONS).apply(loaded) as applied:
            applied(**data)
            first, second = applied.kept[-1], applied.kept[2]
            assert applied.report.bars["visual tokens"][0].kept == len(first[0])
        entering, staying = VScan(**OPTIONS).counts(36, 0.5)
        share = entering / 36
        seen = []
        detach = tap_attention(decoder.layers[2].attention.module, seen.append)
        # The same first cut, and no second one.
        with zoo.method("vscan", **{**OPTIONS, "keep_ratio": share, "inside_ratio": 1}).apply(
            loaded
        ) as applied:
            applied(**data)
            assert [k.tolist() for k in applied.kept[-1]] == [k.tolist() for k in first]
        detach()
    for sample in range(3):
        length = seen[0].key.shape[2]
        gone = 36 - len(first[sample])
        row = seen[0].rows(sample, torch.tensor([length - 1]))[:, 0].mean(0)
        # From the right, as padding stands on the left; text after the picture keeps its distance to the end.
        places = visual_places(loaded, data["input_ids"][sample])
        after = data["input_ids"].shape[1] - 1 - int(places[-1])
        scores = row[length - after - len(first[sample]) : length - after]
        assert gone > 0
        expected = first[sample][scores.topk(staying).indices.sort().values]
        if dtype == torch.float32:
            assert second[sample].tolist() == expected.tolist()
        else:
            assert len(set(second[sample].tolist()) & set(expected.tolist())) >= staying - 1


def test_merged_tokens_are_means_of_their_likeness() -> None:
    loaded = load("tiny-llava")
    data = loaded.processor(images=[picture(3)], text=["<image>\nwhat?"], return_tensors="pt")
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    inputs: list[torch.Tensor] = []
    hook = decoder.layers[0].module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        loaded.model(**data)
        with zoo.method("vscan", **OPTIONS).apply(loaded) as applied:
            applied(**data)
            kept = applied.kept[-1][0]
    hook.remove()
    places = visual_places(loaded, data["input_ids"][0])
    dense, short = inputs
    members = {place: [place] for place in kept.tolist()}
    for place in set(places.tolist()) - set(kept.tolist()):
        likeness = [float(torch.cosine_similarity(dense[place], dense[other], dim=0)) for other in kept]
        members[int(kept[max(range(len(kept)), key=likeness.__getitem__)])].append(place)
    expected = torch.stack([dense[own].mean(0) for own in members.values()])
    start = int(places[0])
    torch.testing.assert_close(short[start : start + len(kept)], expected, rtol=1e-4, atol=1e-5)
    assert max(map(len, members.values())) > 1


def test_every_crop_has_its_own_budget_and_newlines_stay() -> None:
    loaded = load("tiny-llava-next")
    data = loaded.processor(images=[picture(0)], text=["<image>\nwhat?"], return_tensors="pt")
    with torch.no_grad(), zoo.method("vscan", **OPTIONS, inside_ratio=1).apply(loaded) as applied:
        applied(**data)
        kept = applied.kept[-1][0]
    places = visual_places(loaded, data["input_ids"][0])
    thumbnail = kept[kept <= places[35]]
    assert len(thumbnail) == 4 * (int(round(0.4 * 36) * 0.5) // 4) + round(0.4 * 36) - int(
        round(0.4 * 36) * 0.5
    )
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert int(places[-1]) in kept.tolist()  # the newline of the last row


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_both_cuts_work_on_places_in_a_grid(name: str) -> None:
    loaded = load(name)
    data = loaded.processor(images=[picture(0)], text=["<image>\nwhat?"], return_tensors="pt")
    with torch.no_grad(), zoo.method("vscan", **OPTIONS).apply(loaded) as applied:
        applied(**data)
        first, second = applied.kept.values()
        assert applied.report.facts["position ids"] == "kept"
    assert 0 < len(second[0]) < len(first[0]) < applied.report.total
    assert set(second[0].tolist()) < set(first[0].tolist())
