"""Pictures to learn from, with a class for each picture or for each pixel.

They come from packaged sets (``zoo.image_data``) or from folders. Files are opened when their turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import BadInput
from zoo.image_data import IMAGE_SETS, LabelledImages, labelled

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CANVAS = 96
"""Side of a composed canvas, in pixels."""
CANVAS_SETS = ("cifar10", "fashion-mnist")
IGNORED = 255
"""Mask value of pixels that belong to no class."""
_INK = 16
"""Grey pictures on black: brighter pixels belong to the thing."""


@dataclass(frozen=True)
class LabelledPicture:
    """A picture and its class, an index into ``classes``."""

    picture: Image.Image
    label: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class MaskedPicture:
    """A picture and the class of each pixel: ``mask [H, W]`` uint8, indices into ``classes`` or ``IGNORED``."""

    picture: Image.Image
    mask: np.ndarray[Any, Any]
    classes: tuple[str, ...]


def labelled_pictures(ref: str | Path) -> Sequence[LabelledPicture]:
    """A packaged set by name (its training part), or a folder with a sub-folder of pictures for each class.

    Raises:
        BadInput: there is no such set or folder, or fewer than two classes in it.
    """
    if str(ref) in IMAGE_SETS:
        return _Packaged(labelled(str(ref)))
    folder = _folder(ref, f"a folder with a sub-folder for each class, or one of {', '.join(IMAGE_SETS)}")
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and _pictures(path)))
    if len(classes) < 2:
        raise BadInput(f"{folder} needs a sub-folder of pictures for each of two classes or more")
    return _Files(
        [(file, number) for number, name in enumerate(classes) for file in _pictures(folder / name)], classes
    )


def masked_pictures(ref: str | Path) -> Sequence[MaskedPicture]:
    """Pictures with a class for each pixel.

    ``cifar10`` and ``fashion-mnist`` give canvases composed of their training pictures. A folder holds ``images/``,
    ``masks/`` (PNG of the same name, the grey value is the class, 255 = none) and ``classes.txt`` (a name per line).

    Raises:
        BadInput: there is no such set or folder, or parts of it are missing.
    """
    if str(ref) in CANVAS_SETS:
        return Canvases(labelled(str(ref)), grey=str(ref) != "cifar10")
    folder = _folder(
        ref, f"a folder with images/, masks/ and classes.txt, or one of {', '.join(CANVAS_SETS)}"
    )
    images, names = folder / "images", folder / "classes.txt"
    if not images.is_dir() or not names.is_file():
        raise BadInput(f"{folder} needs images/, masks/ and classes.txt")
    pairs = [(file, folder / "masks" / f"{file.stem}.png") for file in _pictures(images)]
    missing = next((mask for _, mask in pairs if not mask.is_file()), None)
    if missing is not None:
        raise BadInput(f"there is no mask {missing}")
    return _Masked(pairs, tuple(names.read_text(encoding="utf-8").splitlines()[:IGNORED]))


class _Packaged(Sequence[LabelledPicture]):
    def __init__(self, images: LabelledImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: Any) -> Any:
        from PIL import Image

        images = self._images
        return LabelledPicture(Image.fromarray(images.images[place]), int(images.labels[place]), images.names)


class _Files(Sequence[LabelledPicture]):
    def __init__(self, files: Sequence[tuple[Path, int]], classes: tuple[str, ...]) -> None:
        self._files, self._classes = files, classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: Any) -> Any:
        file, label = self._files[place]
        return LabelledPicture(_open(file), label, self._classes)


class _Masked(Sequence[MaskedPicture]):
    def __init__(self, pairs: Sequence[tuple[Path, Path]], classes: tuple[str, ...]) -> None:
        self._pairs, self._classes = pairs, classes

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, place: Any) -> Any:
        import numpy as np
        from PIL import Image

        image, mask = self._pairs[place]
        with Image.open(mask) as opened:  # palette images hold class numbers as they are
            values = np.asarray(opened if opened.mode in ("L", "P") else opened.convert("L"))
        picture = _open(image)
        if values.shape != (picture.height, picture.width):
            raise BadInput(f"{mask} has another size than its picture")
        wrong = (values >= len(self._classes)) & (values != IGNORED)
        if wrong.any():
            raise BadInput(
                f"{mask} holds class {values[wrong][0]}, and classes.txt has {len(self._classes)} names"
            )
        return MaskedPicture(picture, values, self._classes)


class Canvases(Sequence[MaskedPicture]):
    """Canvases of one to three pictures on a plain background, later ones in front, so that masks are known exactly.

    Canvas ``i`` is always the same. Photographs cover their square; of grey pictures on black (``grey``) only the
    bright pixels are things.
    """

    def __init__(self, images: LabelledImages, *, grey: bool) -> None:
        self._images, self._grey = images, grey
        self._classes = ("background", *images.names)

    def __len__(self) -> int:
        return len(self._images) // 2

    def __getitem__(self, place: Any) -> Any:
        import numpy as np
        from PIL import Image

        random = np.random.default_rng(place)
        canvas = np.empty((CANVAS, CANVAS, 3), np.uint8)
        canvas[:] = random.integers(0, 256, 3)
        mask = np.zeros((CANVAS, CANVAS), np.uint8)
        for chosen in random.integers(0, len(self._images), random.integers(1, 4)):
            side = int(random.integers(CANVAS // 3, CANVAS * 2 // 3))
            top, left = random.integers(0, CANVAS - side, 2)
            pasted = np.asarray(Image.fromarray(self._images.images[chosen]).resize((side, side)))
            thing = pasted.max(-1) >= _INK if self._grey else np.ones((side, side), bool)
            area = np.s_[top : top + side, left : left + side]
            canvas[area][thing] = pasted[thing]
            mask[area][thing] = self._images.labels[chosen] + 1
        return MaskedPicture(Image.fromarray(canvas), mask, self._classes)


def _folder(ref: str | Path, wanted: str) -> Path:
    folder = Path(ref).expanduser()
    if not folder.is_dir():
        raise BadInput(f"there is no folder {ref}; give {wanted}")
    return folder


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _open(file: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise BadInput(f"{file} cannot be read as a picture") from None
