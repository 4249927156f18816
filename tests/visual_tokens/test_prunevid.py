"""PruneVid: merging against loops, pruning and the cut caches against decoding by hand."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import NEW, cast, decoder_call, last_row, load, picture, visual_places
from transformers import DynamicCache

import zoo
from zoo.engines.stretches import contiguous, static_places
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.families.visual_tokens import keep
from zoo.methods.visual_tokens.prunevid import PruneVid
from zoo.models import LoadedModel

QUESTIONS = ("What happens?", "Why is that so, and where?", "?")


def film(seed: int, frames: int = 8) -> list[Any]:
    """Frames that differ a little; one cut."""
    from PIL import Image

    scenes = [picture(seed * 100 + scene) for scene in range(2)]
    return [
        Image.blend(scenes[2 * number // frames], picture(seed * 100 + 9 + number), 0.2)
        for number in range(frames)
    ]


def inputs(loaded: LoadedModel, *samples: int, frames: int = 8) -> dict[str, Any]:
    texts = ["<image>" * frames + QUESTIONS[sample] for sample in samples]
    pictures = [frame for sample in samples for frame in film(sample, frames)]
    return dict(loaded.processor(text=texts, images=pictures, return_tensors="pt", padding=True))


def slow_clusters(x: torch.Tensor, count: int, k: int) -> list[int]:
    """Density peaks, point by point."""
    size = len(x)
    gap = [[float((x[a] - x[b]).norm()) / x.shape[1] ** 0.5 for b in range(size)] for a in range(size)]
    rho = [torch.tensor([-sum(d * d for d in sorted(row)[:k]) / k]).exp().item() for row in gap]
    top = max(max(row) for row in gap)
    delta = [min([gap[a][b] for b in range(size) if rho[b] > rho[a]], default=top) for a in range(size)]
    centres = sorted(range(size), key=lambda a: -rho[a] * delta[a])[:count]
    return [
        centres.index(a) if a in centres else min(range(count), key=lambda c: gap[a][centres[c]])
        for a in range(size)
    ]


def slow_plan(
    x: torch.Tensor, tau: float, ratio: float, share: float, k: int
) -> tuple[list[list[int]], list[int]]:
    """The sets of tokens whose means go on, and the number of the group of each."""
    frames, places, _ = x.shape
    labels = contiguous(slow_clusters(x.mean(1), max(1, int(frames * ratio)), min(k, frames)))
    sets: list[list[int]] = []
    groups: list[int] = []
    group = 0

    def add(cells: list[list[int]], points: torch.Tensor) -> None:
        nonlocal group
        member = list(range(len(points)))
        if len(points) > 14:
            member = slow_clusters(points, int(len(points) * share), k)
        made = [
            [cell for p in range(len(points)) if member[p] == c for cell in cells[p]]
            for c in sorted(set(member))
        ]
        sets.extend(made)
        groups.extend([group] * len(made))
        group += bool(made)

    start = 0
    for _, run in groupby(labels):
        window = list(range(start, start + len(list(run))))
        start = window[-1] + 1
        static = []
        for p in range(places):
            cosines = [
                float(torch.cosine_similarity(x[a, p], x[b, p], dim=0))
                for a in window
                for b in window
                if a != b
            ]
            if cosines and sum(cosines) / len(cosines) > tau:
                static.append(p)
        add([[f * places + p for f in window] for p in static], x[window][:, static].mean(0))
        dynamic = [p for p in range(places) if p not in static]
        for f in window:
            add([[f * places + p] for p in dynamic], x[f, dynamic])
    return sets, groups


def video(seed: int, frames: int, places: int, width: int) -> torch.Tensor:
    """Some places move, some stand still; a cut in the middle."""
    generator = torch.Generator().manual_seed(seed)
    scenes = 2 * torch.randn(2, places, width, generator=generator)
    noise = torch.rand(places, 1, generator=generator) * 3
    x = [
        scenes[2 * f // frames] + noise * torch.randn(places, width, generator=generator)
        for f in range(frames)
    ]
    return torch.stack(x)


@pytest.mark.parametrize(("frames", "places"), [(8, 30), (5, 40), (12, 9), (1, 36), (3, 16)])
def test_merging_equals_loops(frames: int, places: int) -> None:
    x = video(frames, frames, places, 10)
    plan = PruneVid(static_threshold=0.4).plan(x)
    sets, groups = slow_plan(x, 0.4, 0.25, 0.5, 7)
    assert sum(plan.windows) == frames
    found = [(plan.assignment == number).nonzero().squeeze(-1).tolist() for number in range(len(plan.group))]
    assert found == [sorted(own) for own in sets]
    assert plan.first.tolist() == [min(own) for own in sets]
    assert plan.group.tolist() == groups
    assert sum(map(sum, plan.sizes)) == len(sets)


def test_what_stands_still_is_averaged_over_time_and_what_moves_is_not() -> None:
    x = video(0, 6, 12, 10)
    x[:, :5] = x[0, :5]
    plan = PruneVid(static_threshold=0.9, segment_ratio=0.1).plan(x)
    assert plan.sizes == ((5, 6 * 7),)
    for place in range(5):
        assert len(set(plan.assignment.view(6, 12)[:, place].tolist())) == 1
    assert len(set(plan.assignment.view(6, 12)[:, 5:].flatten().tolist())) == 42


def test_a_single_frame_has_nothing_static() -> None:
    assert not bool((static_places(torch.ones(1, 4, 3)) > -1e9).any())
    torch.testing.assert_close(static_places(torch.ones(3, 2, 4)), torch.ones(2))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]),  # the first run of 0 is left over, and joins the last one
        ([1, 1, 2, 0, 0, 0], [1, 1, 0, 0, 0, 0]),
        ([1, 1, 2, 0, 0], [1, 1, 1, 0, 0]),
        ([2, 2, 1, 1, 2, 2], [2, 2, 1, 1, 1, 1]),
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([3], [0]),
        ([4, 4, 4], [4, 4, 4]),
        ([5, 1, 1, 6, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2]),  # 1 has grown to three frames: equal, so the left
    ],
)
def test_refined_labels(labels: list[int], expected: list[int]) -> None:
    assert contiguous(labels) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=16))
def test_every_label_is_one_stretch(labels: list[int]) -> None:
    refined = contiguous(labels)
    stretches = [label for label, _ in groupby(refined)]
    assert len(refined) == len(labels)
    assert len(set(stretches)) == len(stretches)
    assert contiguous(refined) == refined or len(refined) == 1


def test_each_group_keeps_its_own_best() -> None:
    group = torch.tensor([-1, 0, 0, 0, 0, 0, 1, 1, 1, -1])
    scores = torch.tensor([0.0, 0.1, 0.9, 0.3, 0.8, 0.2, 0.5, 0.6, 0.4, 0.0])
    method = PruneVid(inside_ratio=0.4)
    assert method.survivors(scores, group).tolist() == [0, 2, 4, 7, 9]
    assert method.survivors(-scores, group).tolist() == [0, 1, 5, 8, 9]
    everything = torch.zeros(7, dtype=torch.long)
    assert len(method.survivors(torch.rand(7), everything)) == int(7 * 0.4)


# --- under generate -----------------------------------------------------------------------------------------------


class ByHand:
    """Runs the layers of one sample on what it is told, with the caches in its hands."""

    def __init__(
        self, loaded: LoadedModel, hidden: torch.Tensor, positions: torch.Tensor, following: int
    ) -> None:
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        self.decoder, self.head, self.inner = decoder, loaded.model.lm_head, decoder.module
        self.hidden, self.positions, self.following = hidden, positions, following
        self.cache = DynamicCache(config=decoder.config)

    def run(self, number: int) -> torch.Tensor:
        """One layer; the last row of its attention, when it read the prompt."""
        rotary = self.inner.rotary_emb(self.hidden, position_ids=self.positions)
        block = self.inner.layers[number]
        self.before = self.hidden
        row = last_row(block, self.hidden, rotary) if self.hidden.shape[1] > 1 else torch.empty(0)
        self.hidden = block(
            self.hidden,
            attention_mask=None,
            position_embeddings=rotary,
            past_key_values=self.cache,
            use_cache=True,
        )
        return row

    def cut(self, index: list[int]) -> None:
        self.hidden, self.positions = self.hidden[:, index], self.positions[:, index]

    def trim(self, layer: int, index: list[int]) -> None:
        entry = self.cache.layers[layer]
        entry.keys, entry.values = entry.keys[:, :, index], entry.values[:, :, index]

    def decode(self) -> list[int]:
        tokens = [int(self.head(self.inner.norm(self.hidden[:, -1:])).argmax(-1))]
        for step in range(NEW - 1):
            self.hidden = self.decoder.embed(torch.tensor([[tokens[-1]]]))
            self.positions = torch.tensor([[self.following + step]])
            for number in range(len(self.inner.layers)):
                self.run(number)
            tokens.append(int(self.head(self.inner.norm(self.hidden)).argmax(-1)))
        return tokens


def max_rows(hand: ByHand, number: int, rows: list[int]) -> torch.Tensor:
    """Largest attention of any head and row in a layer that is about to run, ``[L]``."""
    best = torch.zeros(hand.hidden.shape[1])
    for row in rows:
        rotary = hand.inner.rotary_emb(hand.hidden[:, : row + 1], position_ids=hand.positions[:, : row + 1])
        found = last_row(hand.inner.layers[number], hand.hidden[:, : row + 1], rotary).amax(0)
        best[: row + 1] = torch.maximum(best[: row + 1], found)
    return best


@torch.no_grad()
def by_hand(loaded: LoadedModel, data: dict[str, Any], layer: int) -> tuple[list[int], list[int]]:
    """Tokens, and the cache lengths after the prompt."""
    places = visual_places(loaded, data["input_ids"][0])
    start, stop = int(places[0]), int(places[-1]) + 1
    embeds = decoder_call(loaded, data)["inputs_embeds"]
    x = embeds[0, places].float().view(8, len(places) // 8, -1)
    sets, groups = slow_plan(x, 0.8, 0.25, 0.5, 7)
    merged = torch.stack([x.flatten(0, 1)[own].mean(0) for own in sets]).to(embeds.dtype)
    hidden = torch.cat((embeds[:, :start], merged[None], embeds[:, stop:]), dim=1)
    length = hidden.shape[1]
    hand = ByHand(loaded, hidden, torch.arange(length).unsqueeze(0), length)
    for number in range(layer - 1):
        hand.run(number)
    scores = max_rows(hand, layer - 1, list(range(start + len(sets), length)))[start:]
    hand.run(layer - 1)
    kept = []
    for group in set(groups):
        own = [number for number in range(len(sets)) if groups[number] == group]
        best = sorted(own, key=lambda number: -float(scores[number]))[: int(len(own) * 0.4)]
        kept += [start + number for number in best]
    index = sorted([*range(start), *kept, *range(start + len(sets), length)])
    hand.cut(index)
    for number in range(layer, len(hand.inner.layers)):
        hand.run(number)
    for number in range(layer):
        hand.trim(number, index)
    lengths = [entry.get_seq_length() for entry in hand.cache.layers]
    return hand.decode(), lengths


@pytest.mark.parametrize("layer", [1, 3])
def test_generate_equals_decoding_by_hand(layer: int) -> None:
    loaded = load("tiny-llava")
    method = zoo.method("prunevid", layer=layer)
    expected = []
    for sample in range(2):
        data = inputs(loaded, sample)
        tokens, lengths = by_hand(loaded, data, layer)
        with method.apply(loaded) as applied:
            ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            with torch.no_grad():
                cache = applied(**data, use_cache=True).past_key_values
            report = applied.report
        assert ids[0, data["input_ids"].shape[1] :].tolist() == tokens
        assert [entry.get_seq_length() for entry in cache.layers] == lengths
        text = data["input_ids"].shape[1] - len(visual_places(loaded, data["input_ids"][0]))
        cached = report.bars["visual tokens left in the cache"]
        assert [text + bar.kept for bar in cached] == lengths
        assert report.bars["visual tokens"][0].kept > cached[0].kept
        expected.append(tokens)
    data = inputs(loaded, 0, 1)
    assert bool((data["attention_mask"] == 0).any())
    with method.apply(loaded) as applied:
        ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
    assert ids[:, data["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-internvl"]
)
def test_videos_in_a_batch_equal_single_ones(name: str, dtype: torch.dtype) -> None:
    loaded = load(name, dtype)
    texts, clips = ["<video>\nWhat happens?", "And here: <video> why?"], [film(1, 6), film(2, 6)]
    with zoo.method("prunevid", layer=2, segment_ratio=0.5).apply(loaded) as applied:
        together = cast(dict(loaded.processor(text=texts, videos=clips)), dtype)
        ids = applied.generate(**together, max_new_tokens=NEW, do_sample=False)
        kept = [len(own) for own in applied.kept[2]]
        for sample in range(2):
            data = cast(dict(loaded.processor(text=[texts[sample]], videos=[clips[sample]])), dtype)
            alone = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            if dtype == torch.float32:
                new = alone[0, data["input_ids"].shape[1] :].tolist()
                assert new == ids[sample, together["input_ids"].shape[1] :].tolist()
                assert len(applied.kept[2][0]) == kept[sample]


@torch.no_grad()
@pytest.mark.parametrize("trims", [0, 1, 2, None])
def test_only_the_caches_asked_for_are_cut(trims: int | None) -> None:
    """The engine's part: layers in front of a stage lose, once the prompt is read, what the stage removed."""
    loaded = load("tiny-llava")
    data = dict(loaded.processor(text=["<image>\nWhat is it?"], images=[picture(1)], return_tensors="pt"))
    places = visual_places(loaded, data["input_ids"][0])
    length = data["input_ids"].shape[1]
    first = [number for number in range(length) if number not in places[20:].tolist()]
    second = [number for number in range(len(first)) if number not in places[5:20].tolist()]
    hand = ByHand(loaded, decoder_call(loaded, data)["inputs_embeds"], torch.arange(length)[None], length)
    hand.run(0)
    hand.cut(first)
    hand.run(1)
    hand.run(2)
    hand.cut(second)
    hand.run(3)
    for number in range(3 if trims is None else trims, 3):
        hand.trim(number, second if number else [first[place] for place in second])
    lengths = [entry.get_seq_length() for entry in hand.cache.layers]
    stages = [
        Stage(1, lambda view: keep(torch.arange(20))),
        Stage(3, lambda view: keep(torch.arange(5)), trims=trims),
    ]
    reducer = TokenReducer(loaded.anatomy, stages, "keep", "test")
    try:
        cache = loaded.model(**data, use_cache=True).past_key_values
        assert [entry.get_seq_length() for entry in cache.layers] == lengths
        ids = loaded.model.generate(**data, max_new_tokens=NEW, do_sample=False)
    finally:
        reducer.close()
    assert ids[0, length:].tolist() == hand.decode()
    assert (reducer.cached_per_layer is None) == (trims is None)


def test_what_is_off_and_what_never_leaves() -> None:
    loaded = load("tiny-llava-onevision")
    assert [stage.layer for stage in PruneVid(inside_ratio=1).stages(loaded.anatomy)] == [-1]
    data = dict(loaded.processor(text=["<video>\nWhat?"], videos=[film(1, 4)]))
    newline = int(visual_places(loaded, data["input_ids"][0])[-1])
    with zoo.method("prunevid", layer=2, inside_ratio=0.05).apply(loaded) as applied:
        applied.generate(**data, max_new_tokens=2)
        assert applied.kept[2][0].tolist() == [newline]
    seen: list[View] = []

    class Looking(PruneVid):
        def prune(self, view: View) -> Any:
            seen.append(view)
            return super().prune(view)

    data = dict(loaded.processor(text=["Before it <video>"], videos=[film(1, 4)]))
    with Looking(layer=2).apply(loaded) as applied, torch.no_grad():
        applied(**data)  # no question behind the video: the last visual token asks
    assert not len(seen[0].question)
