"""What a method sees: the pictures behind the tokens, the encoder that read them, the decoder's layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ARCHITECTURES, VIDEO, clip, decoder_call, load, picture, visual_places

from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.probes import Seen
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import BadInput, Refused
from zoo.models import LoadedModel
from zoo.models.packing import tile_boxes

PATCH = 8


def everything(view: View) -> Keep:
    return Keep(torch.arange(len(view.tokens)).unsqueeze(0))


def look(loaded: LoadedModel, data: dict[str, Any], see: Callable[[View], Any], **stage: Any) -> list[Any]:
    """What ``see`` returns for each sample with visual tokens, at a stage that keeps everything."""
    found = []

    def reduce(view: View) -> Keep:
        found.append(see(view))
        return everything(view)

    reducer = TokenReducer(loaded.anatomy, [Stage(stage.pop("layer", -1), reduce, **stage)], "keep", "test")
    try:
        with torch.no_grad():
            loaded.model(**data)
    finally:
        reducer.close()
    return found


def prompt(loaded: LoadedModel, *pictures: Image.Image) -> dict[str, Any]:
    """Two samples: a square picture, then all the others in one prompt."""
    marks = " and ".join("<image>" for _ in pictures)
    return dict(
        loaded.processor(
            text=["First: <image>.", f"Now {marks}, what?"],
            images=[picture(9, 48, 48), *pictures],
            return_tensors="pt",
            padding=True,
        )
    )


def video_prompt(loaded: LoadedModel) -> dict[str, Any]:
    return dict(loaded.processor(text=["<video> a", "b <video> what?"], videos=[clip(1), clip(2)]))


# --- provenance -------------------------------------------------------------------------------------------------


def without_attention(loaded: LoadedModel) -> LoadedModel:
    """Encoder blocks whose attention adds nothing: a token then depends on its own patches alone."""
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    for block in encoder.blocks:
        output = block.attention.output.linear
        output.weight.data.zero_()
        output.bias.data.zero_()
    return loaded


def patch_of(data: dict[str, Any], image: ImageView, number: int, patch: int) -> torch.Tensor:
    """The pixels of one patch inside the inputs (a view). ``number`` counts pictures over the batch."""
    crop, inner = divmod(patch, image.patches_per_crop)
    first = image.packed.first_crop
    pixels = data["pixel_values_videos" if image.video else "pixel_values"]
    if pixels.dim() == 2:
        return pixels[image._start + patch]
    if (
        pixels.dim() == 5 and not image.video and "image_sizes" in data
    ):  # LLaVA-NeXT pads the crops of each picture
        canvas = pixels[number, crop]
    elif pixels.dim() == 5 and not image.video:  # Idefics pads the crops of each sample
        flat = [(s, c) for s, row in enumerate(pixels) for c in range(len(row)) if bool((row[c] != 0).any())]
        canvas = pixels[flat[first + crop]]
    else:
        canvas = pixels.flatten(0, 1)[first + crop] if pixels.dim() == 5 else pixels[first + crop]
    row, column = (image.patch_coordinates[inner] * PATCH).tolist()
    return canvas[:, row : row + PATCH, column : column + PATCH]


def check_provenance(loaded: LoadedModel, data: dict[str, Any]) -> None:
    """Painting over one patch changes the tokens made from it, and no others."""
    (_, images) = look(loaded, data, lambda view: view.images)
    places = visual_places(loaded, data["input_ids"][1])
    with torch.no_grad():
        before = decoder_call(loaded, data)["inputs_embeds"][1, places]
        for order, image in enumerate(images):
            total = image.crops * image.patches_per_crop
            for patch in torch.linspace(0, total - 1, 7).long().tolist():
                changed = {name: value.clone() for name, value in data.items()}
                patch_of(changed, image, 1 + order, patch).add_(2.0)
                after = decoder_call(loaded, changed)["inputs_embeds"][1, places]
                moved = ((after - before).abs().amax(-1) > 1e-5).nonzero().squeeze(-1)
                expected = image.tokens[(image.patches == patch).any(1)]
                assert moved.tolist() == expected.tolist(), (order, patch)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_painting_a_patch_changes_the_tokens_made_from_it(name: str) -> None:
    loaded = without_attention(load(name))
    check_provenance(loaded, prompt(loaded, picture(1, 70, 50)))
    check_provenance(loaded, prompt(loaded, picture(2, 40, 120), picture(3, 64, 64)))


@pytest.mark.parametrize("name", VIDEO)
def test_painting_a_patch_of_a_video(name: str) -> None:
    loaded = without_attention(load(name))
    check_provenance(loaded, video_prompt(loaded))


def test_a_mosaic_that_the_model_shrinks() -> None:
    """LLaVA-OneVision interpolates large mosaics: a token comes from up to four patches, also across tiles."""
    loaded = without_attention(load("tiny-llava-onevision"))
    data = prompt(loaded, picture(4, 190, 190))
    (_, (image,)) = look(loaded, data, lambda view: view.images)
    assert image.crops == 17
    assert image.parts[1].grid != (24, 24)
    assert image.patches.shape[1] == 4
    assert bool((image.patches // image.patches_per_crop).amax(1).ne(image.crop).any())
    check_provenance(loaded, data)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_boxes_and_coordinates_say_where_a_patch_is_in_the_picture(name: str) -> None:
    """A picture whose red grows to the right and whose green grows downwards tells where each token looks."""
    across, down = np.meshgrid(np.linspace(0, 255, 120), np.linspace(0, 255, 80))
    painted = Image.fromarray(np.stack((across, down, 0 * down), -1).astype(np.uint8))
    loaded = load(name)

    def see(view: View) -> Any:
        return view.images[0], view.images[0].patch_pixels()

    (_, (image, pixels)) = look(loaded, prompt(loaded, painted), see)
    if image.boxes is None:
        pytest.skip("the model is not told what the processor cut off")
    assert len(image.boxes) == image.crops
    colour = pixels.flatten(3).mean(-1)[..., :2]
    seen, told = [], []
    rows, columns = (image.patch_coordinates.amax(0) + 1).tolist()
    for crop, (left, top, right, bottom) in enumerate(image.boxes):
        for patch, (row, column) in enumerate(image.patch_coordinates.tolist()):
            x = left + (right - left) * (column + 0.5) / columns
            y = top + (bottom - top) * (row + 0.5) / rows
            if 0.05 < x < 0.95 and 0.05 < y < 0.95:
                seen.append(colour[crop, patch])
                told.append((x, y))
    seen, told = torch.stack(seen), torch.tensor(told)
    for axis in range(2):
        assert torch.corrcoef(torch.stack((seen[:, axis], told[:, axis])))[0, 1] > 0.99


def test_tiles_find_their_arrangement() -> None:
    wide = torch.from_numpy(np.asarray(picture(0, 144, 96)).copy()).permute(2, 0, 1).float()
    tiles = [wide[:, r * 48 : (r + 1) * 48, c * 48 : (c + 1) * 48] for r in range(2) for c in range(3)]
    small = torch.nn.functional.interpolate(wide[None], (48, 48), mode="bilinear")
    boxes = tile_boxes(torch.cat((torch.stack(tiles), small)))
    assert boxes[0] == (0, 0, 1 / 3, 1 / 2)
    assert boxes[4] == (1 / 3, 1 / 2, 2 / 3, 1)
    assert boxes[6] == (0, 0, 1, 1)


# --- layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_token_has_its_place(name: str) -> None:
    loaded = load(name)
    data = prompt(loaded, picture(1, 70, 50), picture(2, 40, 100))
    asked: list[int] = []

    def see(view: View) -> Any:
        assert torch.equal(torch.cat([image.tokens for image in view.images]), torch.arange(len(view.tokens)))
        assert torch.equal(view.ordinal, torch.arange(len(view.tokens)))
        assert bool((view.system < view.index[0]).all())
        asked.append(len(view.question))
        return view.images

    for images in look(loaded, data, see):
        for image in images:
            assert bool((image.newline == (image.patches < 0).all(1)).all())
            for number, part in enumerate(image.parts):
                own = image.coordinates[image.part == number]
                assert len(own) == np.prod(part.grid)
                assert own.tolist() == [list(cell) for cell in np.ndindex(*part.grid)]
                assert set(image.crop[image.part == number].tolist()) <= set(part.crops)
                assert bool((image.thumbnail[image.part == number] == part.thumbnail).all())
    assert asked[1] - asked[0] == len(", what?") - len(".")  # beside the markup behind a picture


def test_any_resolution_layout() -> None:
    loaded = load("tiny-llava-next")
    (_, (image,)) = look(loaded, prompt(loaded, picture(1, 96, 48)), lambda view: view.images)
    assert image.grid is None
    assert image.size == (48, 96)
    assert [(part.grid, part.thumbnail, part.crops) for part in image.parts] == [
        ((6, 6), True, (0,)),
        ((6, 12), False, (1, 2)),
    ]
    assert image.newline.nonzero().squeeze(-1).tolist() == [36 + 13 * row + 12 for row in range(6)]
    assert image.boxes == ((0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1))


def test_grids_of_pictures_and_videos() -> None:
    loaded = load("tiny-qwen2.5-vl")
    data = dict(loaded.processor(text=["<image> <video>"], images=[picture(1, 64, 32)], videos=[clip(1)]))
    ((still, moving),) = look(loaded, data, lambda view: view.images)
    assert (still.grid, still.video) == ((2, 4), False)
    assert (moving.grid, moving.video, moving.crops) == ((2, 2, 3), True, 2)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next", "tiny-qwen3-vl"])
def test_later_stages_see_what_is_left(name: str) -> None:
    loaded = load(name)
    data = prompt(loaded, picture(1), picture(2, 40, 100))
    seen: list[Any] = []

    def even(view: View) -> Keep:
        view.memory["full"] = torch.arange(view.total) * 10
        seen.append((view.images, view.generator.initial_seed()))
        return Keep(torch.arange(0, len(view.tokens), 2).unsqueeze(0))

    def last(view: View) -> Keep:
        assert view.memory["full"][view.ordinal].tolist() == [20 * i for i in range(len(view.tokens))]
        for before, image in zip(seen.pop(0)[0], view.images, strict=True):
            kept = before.tokens % 2 == 0
            assert torch.equal(image.coordinates, before.coordinates[kept])
            assert torch.equal(image.patches, before.patches[kept])
            assert torch.equal(image.tokens * 2, before.tokens[kept])
        return everything(view)

    reducer = TokenReducer(loaded.anatomy, [Stage(-1, even, seed=7), Stage(2, last)], "keep", "test")
    with torch.no_grad():
        loaded.model(**data)
    reducer.close()
    assert not seen


# --- the encoder ------------------------------------------------------------------------------------------------


def eager_maps(loaded: LoadedModel, data: dict[str, Any], block: int) -> torch.Tensor:
    """Attention maps of one encoder block, crop by crop or (Qwen-VL) of the whole sequence, ``[B, H, N, N]``."""
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    attention = encoder.blocks[block].attention
    maps: list[torch.Tensor] = []

    def of_all_crops(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden, (cos, sin) = (args or (kwargs["hidden_states"],))[0], kwargs["position_embeddings"]
        shape = (len(hidden), attention.heads, attention.head_dim)
        query, key = attention.query(hidden).view(shape), attention.key(hidden).view(shape)
        half = attention.head_dim // 2

        def turn(x: torch.Tensor) -> torch.Tensor:
            return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(1)

        scores = torch.einsum("ihd,jhd->hij", turn(query), turn(key)) * attention.scaling
        ends = kwargs["cu_seqlens"].tolist()
        own = torch.cat([torch.full((b - a,), a) for a, b in pairwise(ends)])
        maps.append(scores.masked_fill(own[:, None] != own, -torch.inf).softmax(-1).unsqueeze(0))

    if encoder.packed_order is not None:
        hook = attention.module.register_forward_pre_hook(of_all_crops, with_kwargs=True)
    else:
        loaded.model.set_attn_implementation("eager")
        hook = attention.module.register_forward_hook(lambda _, args, output: maps.append(output[1]))
    with torch.no_grad():
        loaded.model(**data)
    hook.remove()
    return maps[0]


@pytest.mark.parametrize("block", [1, -2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoder_rows_equal_eager_attention(name: str, block: int) -> None:
    loaded = load(name)
    data = prompt(loaded, picture(1, 70, 50), picture(2, 40, 100))

    def see(view: View) -> Any:
        found = []
        for image in view.images:
            size = image.prefix + image.patches_per_crop
            rows = torch.arange(size)
            keys = image.encoder_keys(block)
            assert keys.shape[:1] == (image.crops,)
            assert keys.shape[2] == image.encoder_hidden(block).shape[1] == size
            assert image.encoder_queries(block).shape == keys.shape == image.encoder_values(block).shape
            found.append((image, image.encoder_rows(block, rows), image.encoder_received(block)))
        return found

    seen = look(loaded, data, see, observes_encoder=(EncoderWatch(block, hidden=True),))
    maps = eager_maps(load(name), data, block % 4)
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    if encoder.packed_order is not None:
        back = encoder.packed_order(data["image_grid_thw"]).argsort()
        maps = maps[:, :, back][:, :, :, back]
    for image, rows, received in (entry for sample in seen for entry in sample):
        for crop in range(image.crops):
            if encoder.packed_order is None:
                full = maps[image.packed.first_crop + crop]
            else:
                start = image._start + crop * image.patches_per_crop
                here = slice(start, start + image.patches_per_crop)
                full = maps[0][:, here, here]
            assert (rows[crop] - full).abs().max() < 1e-5
            assert (received[crop] - full.mean(1)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoder_hidden_states_are_numbered_like_transformers(name: str) -> None:
    loaded = load(name)
    data = prompt(loaded, picture(1, 64, 64))
    layers = (0, 2, -2, -1)
    seen = look(
        loaded,
        data,
        lambda view: {layer: view.images[0].encoder_hidden(layer) for layer in layers},
        observes_encoder=tuple(EncoderWatch(layer, attention=False, hidden=True) for layer in layers),
    )
    states: list[torch.Tensor] = []
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    hooks = [
        block.module.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in encoder.blocks
    ]
    hooks.append(
        encoder.blocks[-1].module.register_forward_hook(lambda _, args, output: states.append(output))
    )
    with torch.no_grad():
        loaded.model(**data)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        expected = states[layer]
        if encoder.packed_order is not None:
            expected = expected[encoder.packed_order(data["image_grid_thw"]).argsort()].unsqueeze(0)
            size = int(data["image_grid_thw"][0].prod())
            assert torch.equal(seen[0][layer], expected[:, :size])
            assert torch.equal(seen[1][layer], expected[:, size:])
        else:
            assert torch.equal(torch.cat([sample[layer] for sample in seen]), expected)


def test_the_class_token_on_visual_tokens() -> None:
    for name in ("tiny-llava", "tiny-llava-next", "tiny-internvl"):
        loaded = load(name)
        data = prompt(loaded, picture(1, 70, 50))

        def see(view: View) -> Any:
            rows = view.encoder_rows(-2, torch.tensor([0]))
            return (
                view.images[0],
                rows[:, :, 0, 1:].mean(1).flatten(),
                view.cls_attention(-2),
                len(view.tokens),
            )

        watches = (EncoderWatch(-2),)
        for image, flat, scores, tokens in look(loaded, data, see, observes_encoder=watches):
            expected = [
                float(flat[[p for p in row if p >= 0]].mean()) if max(row) >= 0 else 0.0
                for row in image.patches.tolist()
            ]
            assert scores.shape == (tokens,)
            assert torch.allclose(scores, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-llava-onevision", "tiny-qwen3-vl", "tiny-smolvlm"])
def test_encoders_without_a_class_token_say_so(name: str) -> None:
    loaded = load(name)
    data = prompt(loaded, picture(1, 70, 50))
    watches = (EncoderWatch(-1),)
    with pytest.raises(Refused, match="no \\[CLS\\] token"):
        look(loaded, data, lambda view: view.cls_attention(-1), observes_encoder=watches)
    for scores in look(loaded, data, lambda view: view.mean_attention(-1), observes_encoder=watches):
        assert bool((scores >= 0).all())
        assert scores.max() > 0


def test_only_what_is_watched_is_kept_and_it_is_released() -> None:
    loaded = load("tiny-llava")
    data = prompt(loaded, picture(1))
    views: list[View] = []
    watches = (EncoderWatch(1),)

    def note(view: View) -> None:
        view.encoder_keys(1)
        views.append(view)

    with pytest.raises(BadInput, match="attention 2 of the encoder is not watched"):
        look(loaded, data, lambda view: view.encoder_keys(2), observes_encoder=watches)
    look(loaded, data, note, observes_encoder=watches)
    with pytest.raises(BadInput, match="attention 1 of the encoder is not watched"):
        views[0].encoder_keys(1)  # the stage is over
    with pytest.raises(Refused, match="looks at encoder layer 9; this encoder has 4 blocks"):
        look(loaded, data, everything, observes_encoder=(EncoderWatch(9),))
    assert "get_image_features" not in vars(loaded.model.model)


def test_generate_shows_the_same_pictures_as_a_forward_pass() -> None:
    """``generate`` encodes before the model runs."""
    for name in ARCHITECTURES:
        loaded = load(name)
        data = prompt(loaded, picture(1, 70, 50))
        shown: list[torch.Tensor] = []

        def see(view: View, shown: list[torch.Tensor] = shown) -> Keep:
            shown.append(view.mean_attention(-2))
            return everything(view)

        reducer = TokenReducer(
            loaded.anatomy, [Stage(-1, see, observes_encoder=(EncoderWatch(-2),))], "keep", "test"
        )
        with torch.no_grad():
            loaded.model(**data)
            loaded.model.generate(**data, max_new_tokens=2, do_sample=False)
        reducer.close()
        assert len(shown) == 4
        assert torch.equal(shown[0], shown[2])
        assert torch.equal(shown[1], shown[3])


# --- the decoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_seen_of_a_decoder_layer_equals_eager_attention(name: str) -> None:
    loaded = load(name)
    data = prompt(loaded, picture(1, 70, 50))
    length = data["input_ids"].shape[1]
    rows = torch.tensor([length - 1, length - 4])
    places = ("input", "attention_in", "attention_out", "mlp_in", "mlp_out", "output")

    def see(view: View) -> Any:
        assert int(view.last) == length - 1
        states = {place: view.hidden(1, place) for place in places}
        return (
            view.attention(1, rows),
            view.received(1, rows),
            view.keys(1),
            view.values(1),
            view.queries(1),
            states,
        )

    seen = look(
        loaded, data, see, layer=2, observes=(1,), observes_hidden=tuple((1, place) for place in places)
    )
    eager = load(name)
    eager.model.set_attn_implementation("eager")
    decoder = eager.anatomy.decoder
    assert decoder is not None
    layer = decoder.layers[1]
    noted: dict[str, torch.Tensor] = {}

    def first(args: Any, kwargs: Any) -> torch.Tensor:
        return args[0] if args else kwargs["hidden_states"]

    hooks = []
    for label, module in (
        ("", layer.module),
        ("attention", layer.attention.module),
        ("mlp", layer.mlp.module),
    ):
        before, after = (f"{label}_in", f"{label}_out") if label else ("input", "output")
        hooks += [
            module.register_forward_pre_hook(
                lambda _, a, k, name=before: noted.update({name: first(a, k)}), with_kwargs=True
            ),
            module.register_forward_hook(
                lambda _, a, o, name=after: noted.update({name: o[0] if isinstance(o, tuple) else o})
            ),
        ]
    hooks.append(layer.attention.module.register_forward_hook(lambda _, a, o: noted.update(map=o[1])))
    hooks.append(  # with deep-stacked features, the next layer gets more than this one returns
        decoder.layers[2].module.register_forward_pre_hook(
            lambda _, a, k: noted.update(output=first(a, k)), with_kwargs=True
        )
    )
    with torch.no_grad():
        eager.model(**data)
    for hook in hooks:
        hook.remove()
    for sample, (attention, received, keys, values, queries, states) in enumerate(seen):
        full = noted["map"][sample]
        assert (attention - full[:, rows]).abs().max() < 1e-5
        assert (received - full[:, rows].sum(1)).abs().max() < 1e-5
        scores = queries @ keys.repeat_interleave(len(queries) // len(keys), 0).transpose(1, 2)
        causal = torch.ones(length, length, dtype=torch.bool).tril() & data["attention_mask"][sample].bool()
        rebuilt = (scores * layer.attention.scaling).masked_fill(~causal, -torch.inf)[:, rows].softmax(-1)
        assert (rebuilt - full[:, rows]).abs().max() < 1e-5
        assert values.shape == keys.shape
        real = data["attention_mask"][sample].bool()
        for place in places:
            assert (states[place] - noted[place][sample])[real].abs().max() < 1e-4, place


def test_random_numbers_depend_on_the_seed_alone() -> None:
    loaded = load("tiny-llava")
    data = prompt(loaded, picture(1))
    draw = lambda view: torch.rand(3, generator=view.generator)  # noqa: E731
    one, two = look(loaded, data, draw, seed=3)
    assert torch.equal(one, two)
    assert torch.equal(one, look(loaded, data, draw, seed=3)[0])
    assert not torch.equal(one, look(loaded, data, draw, seed=4)[0])


def test_encoded_features_instead_of_pixels_are_refused_in_one_line() -> None:
    loaded = load("tiny-llava")
    data = prompt(loaded, picture(1))
    with torch.no_grad():
        encoded = loaded.model.model.get_image_features(
            pixel_values=data.pop("pixel_values"), return_dict=True
        )
    data["mm_encoder_outputs"] = {"image": encoded}
    with pytest.raises(BadInput, match="pass pixels, not encoded features"):
        look(loaded, data, lambda view: view.images)


def test_kernels_that_take_all_pictures_in_one_call_show_the_same() -> None:
    """Flash kernels get the packed sequence whole, with the ends of its stretches; others get stretch by stretch."""
    loaded = load("tiny-qwen2.5-vl")
    data = prompt(loaded, picture(1, 70, 50))

    def see(view: View) -> Any:
        image = view.images[0]
        apart = image._encoded.seen[0]
        rows = image.encoder_rows(0, torch.arange(image.patches_per_crop))
        ends = torch.tensor([0, *(call.query.shape[2] for call in apart)]).cumsum(0)
        query, key, value = (
            torch.cat([getattr(call, x) for call in apart], 2) for x in ("query", "key", "value")
        )
        image._encoded.seen[0] = [Seen(query, key, value, None, apart[0].scaling, False, stretches=ends)]
        again = image.encoder_rows(0, torch.arange(image.patches_per_crop))
        image._encoded.seen[0] = apart  # both samples share the call
        return len(apart), rows, again

    for windows, apart, together in look(loaded, data, see, observes_encoder=(EncoderWatch(0),)):
        assert windows > 2
        assert torch.equal(apart, together)
