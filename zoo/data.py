"""Texts and pictures to run on: small real ones that packages carry, and the user's own files.

Packaged data are fetched when first used, checked against a pinned digest and kept (see ``zoo.models.packages``);
nothing is vendored.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.errors import BadInput, DownloadFailed, NeedsExtra
from zoo.models.packages import PackageFile, fetch

if TYPE_CHECKING:
    import torch
    from PIL import Image

Split = Literal["calibration", "heldout"]

_WHEEL = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Packaged:
    """Data in a package: the file, what it is, and under which terms."""

    file: PackageFile
    description: str
    licence: str


TEXTS = {
    "news": Packaged(
        PackageFile(
            kind="pip",
            package="gensim",
            version="4.4.0",
            member="gensim/test/test_data/lee_background.cor",
            sha256="5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
            megabytes=27.8,
            platforms=_WHEEL,
        ),
        "300 English news items of about 200 words (Lee background corpus, ABC 2000-2001).",
        "research corpus, distributed with gensim (LGPL-2.1)",
    ),
}
"""Packaged texts by name, one text per line of the file."""

HUB = "hub:"
"""How the name of a dataset on the hub begins."""
HUB_ROWS = 10_000
"""Rows read of a dataset on the hub: the first ones, so that every run reads the same."""
_HUB_PLACE = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<configuration>[\w.+-]+))?(:(?P<split>[\w.-]+)(:(?P<column>\w+))?)?"
)

NEWS_CALIBRATION = 200
"""Items 0 to 199 of ``news`` are for calibration, 200 to 299 are held out. No item of one part recurs in the other."""


def _photo(name: str, digest: str) -> Packaged:
    file = PackageFile(
        kind="pip",
        package="scikit-learn",
        version="1.9.1",
        member=f"sklearn/datasets/images/{name}.jpg",
        sha256=digest,
        megabytes=9.3,
        platforms=_WHEEL,
    )
    return Packaged(
        file, f"Photograph {name}.jpg, 640 x 427 pixels, distributed with scikit-learn.", "CC-BY-2.0"
    )


PICTURES = {
    "china": _photo("china", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"),
    "flower": _photo("flower", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"),
    "coffee": Packaged(
        PackageFile(
            kind="pip",
            package="scikit-image",
            version="0.26.0",
            member="skimage/data/coffee.png",
            sha256="cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
            megabytes=13.7,
            platforms=_WHEEL,
        ),
        "A cup of coffee, 600 x 400 pixels: photograph by Rachel Michetti, distributed with scikit-image.",
        "CC0",
    ),
}
"""Packaged photographs by name."""

COPY_PROMPT = """\
Here is a short text.

The old lighthouse stands at the end of a narrow road. Every evening the keeper climbs the ninety-nine steps of the \
old lighthouse, lights the lamp, and writes one line in the log book: the date, the wind, and the ships that passed. \
In the morning the keeper climbs the ninety-nine steps again, puts out the lamp, and reads the line aloud. Nobody has \
asked for the log book in years, but the keeper of the old lighthouse writes one line every evening all the same.

Repeat the text above, word for word.
"""
"""A prompt whose answer mostly repeats it: where drafting from the prompt has something to find."""


def load_texts(ref: str | Path, split: Split | None = None) -> list[str]:
    """Texts by packaged name or from a file.

    Args:
        ref: a name in ``TEXTS``; a file: ``.txt`` (paragraphs between blank lines), ``.jsonl`` (one string, or
            object with a field ``text``, per line), ``.json`` (a list of such), ``.parquet`` (a column ``text``); or
            a dataset on the hub, ``hub:owner/name[@configuration][:split[:column]]``, of which the first
            ``HUB_ROWS`` rows are read (split ``train`` and column ``text`` unless said otherwise).
        split: ``calibration`` or ``heldout`` for packaged texts, which are cut so that the two share nothing;
            ``None`` takes all of it. A user's file has no split.

    Raises:
        BadInput: no such name, file, dataset, split or column, a file in another format or without any text.
        NeedsExtra: a parquet file without pyarrow, a dataset without the ``datasets`` library.
        DownloadFailed: packaged texts or a dataset could not be fetched.
    """
    if str(ref) in TEXTS:
        if split not in (None, "calibration", "heldout"):
            raise BadInput(f"there is no split called '{split}'; there are calibration and heldout")
        lines = fetch(TEXTS[str(ref)].file).read_text(encoding="utf-8").splitlines()
        parts = {None: lines, "calibration": lines[:NEWS_CALIBRATION], "heldout": lines[NEWS_CALIBRATION:]}
        return parts[split]
    if split is not None:
        raise BadInput(f"{ref} is not a packaged text and has no {split} part; give one file per purpose")
    if str(ref).startswith(HUB):
        return _read_hub(str(ref).removeprefix(HUB))
    path = Path(ref).expanduser()
    if not path.is_file():
        raise BadInput(
            f"there are no texts called '{ref}'; give a file, {HUB}OWNER/NAME, or one of: {', '.join(TEXTS)}"
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path.name}: texts are read from {', '.join(_READERS)} files")
    try:
        texts = [text for text in reader(path) if text.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    if not texts:
        raise BadInput(f"{path} holds no text")
    return texts


def _read_txt(path: Path) -> Iterator[str]:
    yield from re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(_parse(line, f"line {number} of {path}"), f"line {number} of {path}")


def _read_json(path: Path) -> Iterator[str]:
    items = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(items, list):
        raise BadInput(f"{path} must hold a list of strings, or of objects with a field 'text'")
    for index, item in enumerate(items):
        yield _text_of(item, f"item {index} of {path}")


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise NeedsExtra(
            "reading parquet files needs pyarrow; install it with: pip install 'efficiency-zoo[datasets]'"
        ) from None
    try:
        column = parquet.read_table(path, columns=["text"]).column("text")
    except (KeyError, pyarrow.ArrowException) as error:
        raise BadInput(f"{path} must be a parquet file with a column 'text': {error}") from None
    yield from (str(text) for text in column.to_pylist() if text is not None)


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _read_hub(place: str) -> list[str]:
    """Texts of a dataset on the hub, streamed: nothing but the rows that are read is downloaded."""
    found = _HUB_PLACE.fullmatch(place)
    if found is None:
        raise BadInput(
            f"'{HUB}{place}' is not a dataset; write {HUB}OWNER/NAME[@CONFIGURATION][:SPLIT[:COLUMN]]"
        )
    try:
        import datasets
    except ImportError:
        raise NeedsExtra(
            "reading datasets from the hub needs the datasets library; install it with: pip install "
            "'efficiency-zoo[datasets]'"
        ) from None
    split, column = found["split"] or "train", found["column"] or "text"
    try:
        rows = datasets.load_dataset(found["name"], found["configuration"], split=split, streaming=True)
        read = list(islice(rows, HUB_ROWS))
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"{HUB}{place} cannot be read: {_first_line(error)}") from None
    except Exception as error:  # whatever the library's file systems and HTTP clients raise
        raise DownloadFailed(
            f"the dataset {found['name']} could not be fetched: {_first_line(error)}"
        ) from None
    if read and column not in read[0]:
        raise BadInput(f"{HUB}{place} has no column '{column}'; it has {', '.join(read[0])}")
    texts = [row[column] for row in read if isinstance(row[column], str) and row[column].strip()]
    if not texts:
        raise BadInput(f"{HUB}{place} holds no text in its column '{column}'")
    return texts


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts and where they end, in hexadecimal: equal for equal texts only."""
    total = hashlib.sha256()
    for text in texts:
        piece = text.encode()
        total.update(len(piece).to_bytes(8, "little") + piece)
    return total.hexdigest()


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON: {error}") from None


def _text_of(item: Any, where: str) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise BadInput(f"{where} must be a string or have a field 'text' with a string")
    return text


def calibration_windows(
    tokenizer: Any, texts: Sequence[str], samples: int, length: int, seed: int = 0
) -> torch.Tensor:
    """Random windows of the stream of tokens that ``texts`` make, one after the other, a blank line between them.

    Args:
        tokenizer: of the model; no special tokens are added.
        texts: as from ``load_texts``.
        samples, length: number of windows, and tokens in each.
        seed: where the windows start. The same seed gives the same windows; no two windows are the same, but they may
            overlap. The global random state is neither read nor changed.

    Returns:
        Token ids ``[samples, length]``, int64, on the CPU.

    Raises:
        BadInput: there is no tokenizer, a count below one, or too little text for so many windows.
    """
    import torch

    if tokenizer is None:
        raise BadInput("calibration on text needs a tokenizer, and this model has none")
    if samples < 1 or length < 1:
        raise BadInput(
            f"calibration needs at least one window of one token (asked for: {samples} of {length})"
        )
    if isinstance(texts, str):
        raise BadInput("calibration texts are a list of strings, not one string")
    # verbose=False: the stream is cut into windows, so no warning that a text exceeds the model's context.
    pieces: list[list[int]] = []
    if texts:
        spaced = [f"{text}\n\n" for text in texts]
        pieces = tokenizer(spaced, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in pieces for token in ids], dtype=torch.long)
    needed = length + samples - 1
    if len(stream) < needed:
        raise BadInput(
            f"the calibration texts have {len(stream)} tokens and {samples} windows of {length} need at least "
            f"{needed}; give more text, or ask for fewer or shorter windows"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(len(stream) - length + 1, generator=generator)[:samples]
    return stream.unfold(0, length, 1)[starts].clone()


def load_picture(ref: str | Path) -> Image.Image:
    """A packaged photograph by name, or a picture file, as an RGB image (turned upright as its EXIF data say).

    Raises:
        BadInput: no such name or file, or the file is not a picture that Pillow can read.
        DownloadFailed: a packaged photograph could not be fetched.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = fetch(PICTURES[str(ref)].file) if str(ref) in PICTURES else Path(ref).expanduser()
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give a picture file")
    try:
        # Pillow warns of large pictures on standard error, and refuses those of more than twice that size.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise BadInput(f"there is no picture {path}; give a file, or one of: {', '.join(PICTURES)}") from None
    except UnidentifiedImageError:
        raise BadInput(f"{path} is not a picture in a known format") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise BadInput(f"{path} has more than {most:,} pixels; make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow reports damaged files as one or the other.
        raise BadInput(f"{path} cannot be read as a picture: {error}") from None
