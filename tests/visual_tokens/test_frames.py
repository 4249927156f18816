"""Films: what counts as the frames of a video, and what becomes of the tokens around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import ARCHITECTURES, NEW, VIDEO, cast, clip, load, picture

import zoo
from zoo.engines.frames import attention_received, before_pooling, films_of, pooling, weave
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import BadInput
from zoo.models import LoadedModel

METHODS = ("aot", "fastvid", "holitom")


def look(loaded: LoadedModel, data: dict[str, Any], at: Callable[[View], None]) -> None:
    def reduce(view: View) -> Keep:
        at(view)
        return Keep(torch.arange(len(view.tokens)).unsqueeze(0))

    watch = EncoderWatch(-1, hidden=True)
    reducer = TokenReducer(loaded.anatomy, [Stage(-1, reduce, observes_encoder=(watch,))], "keep", "test")
    try:
        with torch.no_grad():
            loaded.model(**data)
    finally:
        reducer.close()


@pytest.mark.parametrize("name", VIDEO)
def test_a_video_is_one_film_however_the_model_gets_it(name: str) -> None:
    loaded = load(name)

    def check(view: View) -> None:
        (film,) = films_of(view)
        frames = 3 if "qwen" in name else 5  # Qwen-VL reads two frames at once
        assert film.tokens.shape == (frames, film.grid[0] * film.grid[1])
        assert film.tokens.flatten().tolist() == list(range(film.tokens.numel()))
        assert films_of(view, pictures=False)[0].tokens.shape == film.tokens.shape

    look(loaded, dict(loaded.processor(text=["<video> what?"], videos=[clip(1, 5)])), check)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_grid_of_a_still_picture_is_a_film_of_one_frame(name: str) -> None:
    loaded = load(name)

    def check(view: View) -> None:
        films = films_of(view)
        assert len(films) == sum(len(image.parts) for image in view.images)
        assert all(len(film.tokens) == 1 for film in films)
        owned = torch.cat([film.tokens.flatten() for film in films])
        assert len(owned.unique()) == len(owned)
        newlines = sum(int(image.newline.sum()) for image in view.images)
        assert len(owned) == len(view.tokens) - newlines
        assert films_of(view, pictures=False) == []

    look(loaded, dict(loaded.processor(text=["<image>?"], images=[picture(1)], return_tensors="pt")), check)


def test_projected_patches_pool_to_the_visual_tokens() -> None:
    loaded = load("tiny-llava-onevision")

    def check(view: View) -> None:
        (film,) = films_of(view)
        patches, pool = before_pooling(loaded.anatomy, film), pooling(loaded.anatomy)
        assert patches is not None
        assert pool is not None
        assert patches.shape[:2] == (4, 36)
        torch.testing.assert_close(pool(patches), view.tokens[film.tokens], rtol=0, atol=1e-5)
        received = attention_received(view, loaded.anatomy, -1)
        assert received[-1] == 0, "the newline comes from no patch"
        # 6 x 6 patches become 3 x 3 tokens: each is the plain mean of four.
        torch.testing.assert_close(received, view.mean_attention(-1), rtol=1e-5, atol=1e-7)

    look(loaded, dict(loaded.processor(text=["<video> what?"], videos=[clip(1, 4)])), check)


def test_newlines_stay_where_something_is_left_in_front_of_them() -> None:
    # Two rows of three cells with a newline each, and a last token that nothing stands in front of.
    film = torch.tensor([[0, 1, 2, 4, 5, 6]])
    place = torch.tensor([3, 5])
    woven = weave(9, [film], [(place, torch.eye(6)[place])])
    assert woven.anchor[0].tolist() == [4, 6, 7, 8]
    assert torch.equal(woven.matrix[0], torch.eye(9)[[4, 6, 7, 8]])
    everything = weave(9, [film], [(torch.arange(6), torch.eye(6))])
    assert everything.anchor[0].tolist() == list(range(9))


def test_a_film_of_its_own_keeps_the_order_of_its_outputs() -> None:
    film = torch.arange(1, 7).view(2, 3)
    place = torch.tensor([4, 0, 2])
    woven = weave(8, [film], [(place, torch.eye(6)[place])])
    assert woven.anchor[0].tolist() == [0, 5, 1, 3, 7]


def generate(applied: zoo.Applied, data: dict[str, Any]) -> list[list[int]]:
    ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
    return ids[:, data["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("slug", METHODS)
@pytest.mark.parametrize("name", VIDEO)
def test_videos_in_a_padded_batch_equal_single_ones(name: str, slug: str) -> None:
    loaded = load(name)
    prompts, clips = ("<video>\nWhat happens?", "And here: <video> why?"), (clip(1, 9), clip(2, 9))
    with zoo.method(slug, keep_ratio=0.4).apply(loaded) as applied:
        together = generate(applied, dict(loaded.processor(text=prompts, videos=clips)))
        for sample in range(2):
            alone = dict(loaded.processor(text=[prompts[sample]], videos=[clips[sample]]))
            assert generate(applied, alone) == [together[sample]]
            report = applied.report
            assert 0 < report.kept < report.total


@pytest.mark.parametrize("slug", METHODS)
def test_a_still_picture_beside_a_video_can_be_left_whole(slug: str) -> None:
    loaded = load("tiny-llava-onevision")
    data = dict(loaded.processor(text=["<image> and <video>?"], images=[picture(5)], videos=[clip(3, 6)]))
    changes = {"inner_keep_ratio": 1.0} if slug == "holitom" else {}
    places = (data["input_ids"][0] == loaded.anatomy.image_token_id).nonzero().squeeze(-1).tolist()
    with (
        zoo.method(slug, keep_ratio=0.2, pictures=False, **changes).apply(loaded) as applied,
        torch.no_grad(),
    ):
        applied(**data)
        kept = set(applied.kept[-1][0].tolist())
        assert set(places) <= kept
        assert applied.report.kept < applied.report.total
    with zoo.method(slug, keep_ratio=0.2, **changes).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        assert not set(places) <= set(applied.kept[-1][0].tolist())


@pytest.mark.parametrize("slug", METHODS)
def test_bf16_keeps_what_fp32_keeps(slug: str) -> None:
    """The same features in both types: what is decided is decided in float32."""
    full, half = load("tiny-llava-onevision"), load("tiny-llava-onevision", torch.bfloat16)
    kept = []
    for loaded in (full, half):
        data = dict(loaded.processor(text=["<video> what?"], videos=[clip(4, 8)]))
        with zoo.method(slug, keep_ratio=0.4).apply(loaded) as applied, torch.no_grad():
            output = applied(**cast(data, loaded.model.dtype))
            assert torch.isfinite(output.logits).all()
            kept.append(len(applied.kept[-1][0]))
    assert abs(kept[0] - kept[1]) <= 0.1 * kept[0]


@pytest.mark.parametrize("slug", METHODS)
def test_keeping_everything_is_bit_equal_and_too_much_is_refused(slug: str) -> None:
    loaded = load("tiny-llava-onevision")
    data = dict(loaded.processor(text=["<video> what?"], videos=[clip(4, 8)]))
    with torch.no_grad():
        dense = loaded.model(**data).logits
        with zoo.method(slug, keep_ratio=1).apply(loaded) as applied:
            assert torch.equal(applied(**data).logits, dense)
        with (
            zoo.method(slug, keep_tokens=1000).apply(loaded) as applied,
            pytest.raises(BadInput, match="only 73 visual tokens"),
        ):
            applied(**data)
        assert torch.equal(loaded.model(**data).logits, dense)
