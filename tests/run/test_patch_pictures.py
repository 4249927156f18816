"""Pictures of encoder methods: what is drawn is what the tokens hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.bench.settings import Settings
from zoo.errors import BadInput
from zoo.patch_pictures import PatchMap, draw_patches, record_patches
from zoo.runner import Request, run


def photo(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def recorded(model: str, slug: str, **options: Any) -> tuple[list[PatchMap], torch.Tensor]:
    loaded = zoo.load_model(model)
    inputs = loaded.processor(images=[photo(0), photo(1)], return_tensors="pt")
    with zoo.method(slug, **options).apply(loaded) as applied:
        return record_patches(applied, **inputs), applied.sources


def test_each_token_is_the_mean_of_its_patches() -> None:
    found, sources = recorded("tiny-dinov2-registers", "tome", r=9)
    for sample in range(2):
        shares = sources[sample, 5:, 5:]
        patches = found[sample].pixels.flatten(0, 1)
        drawn = found[sample].averages().flatten(0, 1)
        for token in shares:
            members = token.nonzero().flatten()
            for patch in members:
                torch.testing.assert_close(drawn[patch], patches[members].mean(0))
        assert found[sample].lengths == [41, 32, 23, 14]
        assert not found[sample].dropped.any()


def test_pixels_are_those_of_the_photo() -> None:
    loaded = zoo.load_model("tiny-vit")
    inputs = loaded.processor(images=[photo()], return_tensors="pt")
    with zoo.method("tome", r=2).apply(loaded) as applied:
        (found,) = record_patches(applied, **inputs)
    flat = found.pixels.permute(0, 3, 1, 4, 2).reshape(48, 48, 3)
    expected = torch.from_numpy(np.array(photo())).float() / 255
    assert flat.shape == expected.shape
    torch.testing.assert_close(flat, expected, rtol=0, atol=1e-5)


def test_dropped_patches_are_dimmed() -> None:
    found, _ = recorded("tiny-vit", "evit", layers=(1,), keep_ratio=0.5, fuse=False)
    assert found[0].dropped.sum() == 18
    page = draw_patches(found[0], "a title")
    same = draw_patches(PatchMap(found[0].pixels, torch.eye(36), found[0].lengths, found[0].total), "a title")
    assert page.size == same.size
    assert np.asarray(page).mean() < np.asarray(same).mean()


@pytest.mark.parametrize(
    ("slug", "options"),
    [("gtp-vit", {"propagated": 5}), ("token-transforming", {"layers": (1, 2)}), ("pitome", {})],
)
def test_a_constant_picture_stays_constant(slug: str, options: dict[str, Any]) -> None:
    found, sources = recorded("tiny-deit", slug, **options)
    grey = PatchMap(torch.full_like(found[0].pixels, 0.4), found[0].shares, found[0].lengths, 38)
    there = grey.averages()[~grey.dropped]
    torch.testing.assert_close(there, torch.full_like(there, 0.4))
    assert torch.equal(found[1].shares, sources[1, 2:, 2:])


def test_a_run_draws_it(tmp_path: Path) -> None:
    file = tmp_path / "patches.png"
    request = Request(parameters={"r": 6}, overlay=file, report=tmp_path / "report", store=False)
    record = run("tome", "tiny-vit", request, settings=Settings(repeats=1))
    assert record.inputs["overlay"] == str(file)
    with Image.open(file) as image:
        assert image.width > 600
    assert (tmp_path / "report" / "overlay.png").read_bytes() == file.read_bytes()
    assert "data:image/png" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(("options", "drawn"), [({"r": 4}, True), ({"r": 4, "restore": True}, False)])
def test_on_a_vision_tower_the_visual_tokens_are_drawn(
    tmp_path: Path, options: dict[str, Any], drawn: bool
) -> None:
    file = tmp_path / "tokens.png"
    request = Request(parameters=options, overlay=file, store=False)
    record = run("tome", "tiny-llava", request, settings=Settings(repeats=1, new_tokens=2))
    assert file.exists() == drawn
    assert drawn or any("Every visual token stays" in note for note in record.notes)


def test_two_methods_that_shorten_the_prompt_one_after_the_other_are_refused() -> None:
    loaded = zoo.load_model("tiny-llava")
    inputs = loaded.processor(images=[photo()], text=["<image> What?"], return_tensors="pt")
    with (
        zoo.method("tome+divprune", r=4).apply(loaded) as applied,
        pytest.raises(BadInput, match="restore=true"),
        torch.no_grad(),
    ):
        applied(**inputs)
    with (
        zoo.method("tome+divprune", **{"r": 4, "tome.restore": True}).apply(loaded) as applied,
        torch.no_grad(),
    ):
        applied(**inputs)
    assert len(applied.reports) == 2


def test_there_must_be_patches_to_draw() -> None:
    loaded = zoo.load_model("tiny-llava")
    with zoo.method("divprune").apply(loaded) as applied, pytest.raises(BadInput, match="no patches"):
        record_patches(applied, pixel_values=torch.zeros(1, 3, 48, 48))
