"""Pictures with a class each, and with a class per pixel: folders, and canvases composed of packaged pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.errors import BadInput
from zoo.image_data import LabelledImages
from zoo.labelled_pictures import CANVAS, Canvases, labelled_pictures, masked_pictures


def save(path: Path, value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(path)


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.png", 10)
    save(tmp_path / "a" / "2.jpg", 20)
    save(tmp_path / "a" / "3.png", 30)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    found = labelled_pictures(tmp_path)
    assert [(item.label, item.classes) for item in found] == [
        (0, ("a", "b")),
        (0, ("a", "b")),
        (1, ("a", "b")),
    ]
    assert found[2].picture.getpixel((0, 0)) == (10, 10, 10)


def test_masks_lie_beside_the_pictures(tmp_path: Path) -> None:
    save(tmp_path / "images" / "x.jpg", 100)
    save(tmp_path / "masks" / "x.png", 1, mode="L")
    (tmp_path / "classes.txt").write_text("ground\nsky\n")
    (one,) = masked_pictures(tmp_path)
    assert one.classes == ("ground", "sky")
    assert one.mask.shape == (4, 6)
    assert set(one.mask.flatten().tolist()) == {1}


@pytest.mark.parametrize(
    ("breaks", "message"),
    [("mask", "no mask"), ("value", "holds class 7"), ("size", "another size"), ("names", "classes.txt")],
)
def test_what_is_wrong_with_masks_is_said(breaks: str, message: str, tmp_path: Path) -> None:
    save(tmp_path / "images" / "x.png", 100)
    if breaks != "mask":
        size = (3, 3) if breaks == "size" else (6, 4)
        save(tmp_path / "masks" / "x.png", 7 if breaks == "value" else 0, size, "L")
    if breaks != "names":
        (tmp_path / "classes.txt").write_text("ground\nsky")
    with pytest.raises(BadInput, match=message):
        masked_pictures(tmp_path)[0]


def test_bad_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cifar10"):
        labelled_pictures(tmp_path / "nowhere")
    save(tmp_path / "only" / "1.png", 1)
    with pytest.raises(BadInput, match="two classes"):
        labelled_pictures(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match="cannot be read"):
        labelled_pictures(tmp_path)[1]


@pytest.mark.parametrize("grey", [False, True])
def test_canvases_know_their_masks(grey: bool) -> None:
    images = np.zeros((20, 28, 28, 3), np.uint8)
    labels = np.arange(20) % 2
    images[:, 7:21, 7:21] = np.where(labels == 0, 200, 250)[:, None, None, None]
    canvases = Canvases(LabelledImages(images, labels.astype(np.int64), ("dim", "bright")), grey=grey)
    assert len(canvases) == 10
    one = canvases[3]
    assert one.classes == ("background", "dim", "bright")
    assert one.mask.shape == (CANVAS, CANVAS)
    pixels = np.asarray(one.picture)
    again = canvases[3]
    assert np.array_equal(np.asarray(again.picture), pixels)
    assert np.array_equal(again.mask, one.mask)
    assert set(np.unique(one.mask)) - {0}
    background = pixels[one.mask == 0]
    assert (background == background[0]).all(), "the background is plain"
    for label, colour in ((1, 200), (2, 250)):
        thing = pixels[one.mask == label]
        if len(thing):
            assert (thing == colour).all(-1).mean() > (0.5 if grey else 0.1)
    assert any(not np.array_equal(canvases[0].mask, canvases[number].mask) for number in range(1, 10))
