from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zoo.image_data
from zoo.errors import BadInput
from zoo.image_data import FASHION_TEST, IMAGE_SETS, ImageSplit, labelled
from zoo.models.packages import PackageFile


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the packaged files are looked for; nothing is downloaded."""

    def local(file: PackageFile) -> Path:
        return tmp_path / file.path.name

    monkeypatch.setattr(zoo.image_data, "fetch", local)
    return tmp_path


def write_mnist(folder: Path, pixels: np.ndarray[Any, Any], labels: list[int]) -> None:
    header = b"".join(number.to_bytes(4, "big") for number in (0x0803, len(pixels), *pixels.shape[1:]))
    (folder / "t10k-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(header[:8] + bytes(labels))


def test_cifar_is_cut_into_pictures(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for part in range(5):
        Image.fromarray(pixels[2 * part : 2 * part + 2].reshape(2, 1024, 3)).save(
            folder / f"data_batch_{part + 1}.png"
        )
    Image.fromarray(pixels[10:].reshape(2, 1024, 3)).save(folder / "test_batch.png")
    (folder / "train_lables.json").write_text(json.dumps([3, 1, 4, 1, 5, 9, 2, 6, 5, 3]))
    (folder / "test_lables.json").write_text("[7, 0]")
    train, test = labelled("cifar10"), labelled("cifar10", "test")
    assert np.array_equal(train.images, pixels[:10])
    assert np.array_equal(test.images, pixels[10:])
    assert (train.labels.dtype, train.labels.tolist(), len(test)) == (
        np.int64,
        [3, 1, 4, 1, 5, 9, 2, 6, 5, 3],
        2,
    )
    assert [test.names[label] for label in test.labels] == ["horse", "airplane"]


def test_grey_pictures_get_three_channels(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    write_mnist(folder, pixels, [7, 2, 1, 0])
    digits = labelled("mnist", "test")
    assert digits.images.shape == (4, 28, 28, 3)
    for channel in range(3):
        assert np.array_equal(digits.images[..., channel], pixels)
    assert digits.labels.tolist() == [7, 2, 1, 0]


def test_parts_of_fashion_share_no_picture(folder: Path) -> None:
    for label in range(10):
        rows = [
            [(number // 256) % 256, number % 256, label] + [0] * 781 for number in range(FASHION_TEST + 3)
        ]
        if label == 0:
            rows.insert(FASHION_TEST, [])
        (folder / f"{label}.json").write_text(json.dumps({"data": rows}))
    train, test = labelled("fashion-mnist", "train"), labelled("fashion-mnist", "test")
    assert (len(train), len(test)) == (30, 10 * FASHION_TEST)
    assert np.array_equal(train.images[:, 0, 2, 0], train.labels)

    def numbers(images: np.ndarray[Any, Any]) -> set[int]:
        return set((images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).tolist())

    assert numbers(train.images) == {FASHION_TEST, FASHION_TEST + 1, FASHION_TEST + 2}
    assert numbers(test.images) == set(range(FASHION_TEST))


def test_a_limit_is_balanced_and_grows(folder: Path) -> None:
    labels = [0] * 30 + [1] * 20 + [2] * 3
    pixels = np.arange(53, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    write_mnist(folder, pixels, labels)
    eight = labelled("mnist", "test", limit=8, seed=1)
    assert sorted(np.bincount(eight.labels)) == [2, 3, 3]
    assert np.array_equal(np.asarray(labels)[eight.images[:, 0, 0, 0]], eight.labels)
    more = labelled("mnist", "test", limit=20, seed=1)
    assert np.array_equal(more.images[:8], eight.images)
    assert np.bincount(more.labels)[2] == 3  # the smallest class has run out
    assert not np.array_equal(labelled("mnist", "test", limit=8, seed=2).images, eight.images)
    everything = labelled("mnist", "test", limit=53)
    assert sorted(everything.images[:, 0, 0, 0].tolist()) == list(range(53))


@pytest.mark.parametrize(
    ("name", "split", "limit", "message"),
    [
        (
            "cifar",
            "train",
            None,
            "no labelled pictures called 'cifar'; there are cifar10, mnist, fashion-mnist",
        ),
        ("mnist", "validation", None, "no split called 'validation'; there are train and test"),
        ("mnist", "test", 5, r"mnist has 4 test pictures; ask for 1 to 4 \(limit=5\)"),
        ("mnist", "test", 0, r"ask for 1 to 4 \(limit=0\)"),
    ],
)
def test_what_is_not_there_is_one_line(
    folder: Path, name: str, split: ImageSplit, limit: int | None, message: str
) -> None:
    write_mnist(folder, np.zeros((4, 28, 28), np.uint8), [0, 1, 2, 3])
    with pytest.raises(BadInput, match=message):
        labelled(name, split, limit)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", IMAGE_SETS)
def test_the_real_pictures(name: str) -> None:
    file = IMAGE_SETS[name].data.file
    if not file.path.is_file():
        pytest.skip(f"{file.label} is not in the cache yet; load it once with a connection")
    train, test = labelled(name), labelled(name, "test")
    assert (len(train), len(test)) == ((50_000 if name == "cifar10" else 60_000), 10_000)
    assert len(train.names) == 10
    assert set(train.labels) == set(test.labels) == set(range(10))
    assert train.images.std() > 50  # real pictures, in their full range
    ours = {picture.tobytes() for picture in test.images}
    shared = sum(picture.tobytes() in ours for picture in train.images)
    assert shared < 50  # a handful of pictures is in the originals twice
