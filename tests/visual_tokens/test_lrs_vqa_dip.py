"""LRS-VQA's coarse-to-fine pruning against loops, and against a decoder read by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import cast, decoder_call, load, picture, visual_places
from staged import attention_map

import zoo
from zoo.errors import Refused
from zoo.methods.visual_tokens.lrs_vqa_dip import LrsVqaDip, above_threshold, highest_share, tiles_hit
from zoo.models import LoadedModel

TEXTS = ["<image>\na", "Look here: <image>\nis it longer?", "so <image>\nthen"]
SIZES = [(70, 50), (90, 40), (40, 90)]
ARRANGEMENT = {(8, 13): (2, 2), (6, 13): (1, 2), (12, 7): (2, 1)}
"""Rows and columns of tile tokens (with newlines) of these pictures -> rows and columns of tiles."""


def inputs(loaded: LoadedModel, samples: tuple[int, ...]) -> dict[str, Any]:
    data = loaded.processor(
        images=[picture(s, *SIZES[s]) for s in samples],
        text=[TEXTS[s] for s in samples],
        return_tensors="pt",
        padding=True,
    )
    return cast(data, loaded.model.dtype)


def row_by_hand(loaded: LoadedModel, embeddings: torch.Tensor, places: list[int], layer: int) -> torch.Tensor:
    """Last attention row in ``layer``, ``[H, n]``, of the tokens at ``places``, which run alone."""
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    hidden = embeddings[places].unsqueeze(0)
    rotary = decoder.module.rotary_emb(hidden, position_ids=torch.arange(len(places)).unsqueeze(0))
    for block in decoder.module.layers[:layer]:
        hidden = block(hidden, attention_mask=None, position_embeddings=rotary)
    return attention_map(decoder.module.layers[layer], hidden[0], rotary)[:, -1]


def attended(row: torch.Tensor, places: list[int], wanted: list[int]) -> torch.Tensor:
    """Softmax over ``wanted`` only, mean over heads, from a softmax over all."""
    part = row[:, [places.index(place) for place in wanted]]
    return (part / part.sum(1, keepdim=True)).mean(0)


def best(scores: torch.Tensor, among: list[int], share: float) -> set[int]:
    order = sorted(range(len(among)), key=lambda number: -float(scores[number]))
    return {among[number] for number in order[: int(len(among) * share)]}


@torch.no_grad()
def by_hand(loaded: LoadedModel, data: dict[str, Any], share: float, layer: int) -> list[int]:
    """Kept places of one LLaVA-NeXT prompt: a thumbnail of 6 x 6, tiles of 6 x 6 with a newline behind each row."""
    embeddings = decoder_call(loaded, data)["inputs_embeds"][0]
    visual = visual_places(loaded, data["input_ids"][0]).tolist()
    text = [place for place in range(len(embeddings)) if place not in visual]
    coarse, fine = visual[:36], visual[36:]
    newline = loaded.model.model.image_newline
    ends = [place for place in fine if torch.equal(embeddings[place], newline)]
    width = ends[0] - fine[0] + 1
    height = len(ends)
    assert height * width == len(fine)

    here = sorted(text + coarse)
    scores = attended(row_by_hand(loaded, embeddings, here, layer), here, coarse)
    down, across = ARRANGEMENT[height, width]
    hit = set()
    for place in best(scores, coarse, share):
        row, column = divmod(place - coarse[0], 6)
        hit.add((int(row * down / 6), int(column * across / 6)))
    # What padding leaves of a tile is what is left of the mosaic: the cut is even on both sides.
    lost_rows, lost_columns = (down * 6 - height) // 2, (across * 6 - (width - 1)) // 2
    valid = []
    for number, place in enumerate(fine):
        row, column = divmod(number, width)
        tile = ((row + lost_rows) // 6, (column + lost_columns) // 6)
        if place in ends or tile in hit:
            valid.append(place)
    here = sorted(text + coarse + valid)
    scores = attended(row_by_hand(loaded, embeddings, here, layer), here, valid)
    return sorted({*coarse, *ends, *best(scores, valid, share)})


@pytest.mark.parametrize(
    ("sample", "share"), [(0, 0.25), (0, 0.05), (1, 0.25), (1, 0.05), (2, 0.1), (2, 0.05)]
)
def test_two_readings_by_hand_keep_the_same_tokens(sample: int, share: float) -> None:
    loaded = load("tiny-llava-next")
    data = inputs(loaded, (sample,))
    expected = by_hand(loaded, data, share, 2)
    method = zoo.method("lrs-vqa-dip", keep_ratio=share, scoring_layer=2)
    with torch.no_grad(), method.apply(loaded) as applied:
        applied(**data)
        assert applied.kept[-1][0].tolist() == expected
        # The same sample in a padded batch: its places move, and nothing else.
        together = inputs(loaded, (0, 1, 2))
        applied(**together)
        padding = int((together["attention_mask"][sample] == 0).sum())
        assert (applied.kept[-1][sample] - padding).tolist() == expected


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_picture_without_tiles_is_pruned_at_once(share: float) -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (1,))
    with torch.no_grad():
        embeddings = decoder_call(loaded, data)["inputs_embeds"][0]
        everything = list(range(len(embeddings)))
        visual = visual_places(loaded, data["input_ids"][0]).tolist()
        scores = attended(row_by_hand(loaded, embeddings, everything, 3), everything, visual)
        with zoo.method("lrs-vqa-dip", keep_ratio=share).apply(loaded) as applied:
            applied(**data)
    assert applied.kept[-1][0].tolist() == sorted(best(scores, visual, share))


def plain_selection(
    attention: list[float], share: float, newline: list[bool], valid: list[bool]
) -> list[int]:
    candidates = [number for number, real in enumerate(valid) if real]
    candidates.sort(key=lambda number: -attention[number])
    chosen = set(candidates[: int(len(candidates) * share)])
    return sorted(chosen | {number for number, end in enumerate(newline) if end})


@pytest.mark.parametrize("seed", range(4))
def test_selection_equals_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(84, generator=generator)
    valid = torch.rand(84, generator=generator) < 0.7
    newline = torch.arange(84) % 7 == 6
    found = highest_share(attention, 0.3, newline, valid)
    assert found.tolist() == plain_selection(attention.tolist(), 0.3, newline.tolist(), valid.tolist())
    cells = found.tolist()
    tiles = sorted({(row * 3 // 12, column * 5 // 7) for row, column in (divmod(cell, 7) for cell in cells)})
    assert [tuple(tile) for tile in tiles_hit(found, (12, 7), (3, 5)).tolist()] == tiles


def test_the_threshold_counts_between_the_quantiles_of_valid_tokens() -> None:
    attention = torch.cat((torch.linspace(0, 1, 101), torch.full((50,), 9.0)))
    valid = torch.arange(151) < 101
    # 5% and 95% of the valid ones are 0.05 and 0.95: a threshold of 0.2 lies at 0.05 + 0.2 * 0.9 = 0.23.
    assert above_threshold(attention, 0.2, valid).tolist() == list(range(24, 101))
    assert above_threshold(torch.ones(5), 0.2, torch.ones(5, dtype=torch.bool)).tolist() == []
    assert above_threshold(torch.ones(5), 0.2, torch.zeros(5, dtype=torch.bool)).tolist() == []
    assert tiles_hit(torch.zeros(0, dtype=torch.long), (6, 6), (2, 2)).tolist() == []


def test_what_the_question_points_to_stays_and_its_inverse_does_not() -> None:
    attention = torch.full((36,), 0.01)
    attention[[7, 8, 13, 14]] = 0.2
    none, whole = torch.zeros(36, dtype=torch.bool), torch.ones(36, dtype=torch.bool)
    assert highest_share(attention, 4 / 36, none, whole).tolist() == [7, 8, 13, 14]
    assert not {7, 8, 13, 14} & set(highest_share(-attention, 4 / 36, none, whole).tolist())
    assert tiles_hit(torch.tensor([7, 8, 13, 14]), (6, 6), (2, 2)).tolist() == [[0, 0]]


def test_tiles_that_are_not_chosen_leave_nothing_but_newlines() -> None:
    loaded = load("tiny-llava-next")
    data = inputs(loaded, (0,))
    kept = {}
    for choose in (True, False):
        method = zoo.method("lrs-vqa-dip", keep_ratio=0.05, choose_tiles=choose)
        with torch.no_grad(), method.apply(loaded) as applied:
            applied(**data)
        kept[choose] = applied.kept[-1][0] - int(applied.kept[-1][0][0])
    local = torch.arange(104)
    assert set(kept[False].tolist()) >= {*range(36), *(36 + local[local % 13 == 12]).tolist()}
    assert len(kept[True]) <= len(kept[False])
    assert kept[True].tolist() == sorted(set(kept[True].tolist()))


@pytest.mark.parametrize(
    "model",
    ["tiny-llava", "tiny-llava-next", "tiny-internvl", "tiny-smolvlm", "tiny-qwen2.5-vl", "tiny-qwen3-vl"],
)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.2}], ids=["share", "threshold"])
def test_bf16_batches_keep_the_order_and_the_thumbnail(model: str, options: dict[str, float]) -> None:
    loaded = load(model, torch.bfloat16)
    data = inputs(loaded, (0, 1, 2))
    with torch.no_grad(), zoo.method("lrs-vqa-dip", **options).apply(loaded) as applied:
        assert applied(**data).logits.isfinite().all()
        kept, total = applied.kept[-1], applied.reducer.visual_total
    for sample, rows in enumerate(kept):
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert 0 < len(rows) < int(total[sample])


def test_the_reading_layers_share_weights_and_leave_no_trace() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 1))
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    calls = []
    hook = decoder.layers[0].module.register_forward_hook(lambda *_: calls.append(1))
    pointers = {parameter.data_ptr() for parameter in loaded.model.parameters()}
    method = zoo.method("lrs-vqa-dip")
    with torch.no_grad():
        dense = loaded.model(**data).logits
        reader = method.stages(loaded.anatomy)[0].reduce.args[1]
        assert {weight.data_ptr() for layer in reader for weight in layer.parameters()} <= pointers
        calls.clear()
        with method.apply(loaded) as applied:
            applied(**data)
        assert len(calls) == 1
        assert torch.equal(loaded.model(**data).logits, dense)
        with zoo.method("lrs-vqa-dip", keep_ratio=1).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)
    hook.remove()


def test_eager_attention_reads_the_same() -> None:
    loaded = load("tiny-llava-next")
    data = inputs(loaded, (0, 1))
    found = []
    for attention in ("sdpa", "eager"):
        loaded.model.set_attn_implementation(attention)
        with torch.no_grad(), zoo.method("lrs-vqa-dip").apply(loaded) as applied:
            applied(**data)
        found.append([rows.tolist() for rows in applied.kept[-1]])
    assert found[0] == found[1]


def test_what_cannot_work_is_refused_in_one_line() -> None:
    with pytest.raises(Refused, match="smaller scoring_layer"):
        LrsVqaDip(scoring_layer=9).apply(load("tiny-llava"))
