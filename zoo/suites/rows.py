"""Rows of a dataset as questions, from the hub or from files of the same form.

Pictures stay as they are stored, and are decoded when a question is asked. With a limit the first rows are streamed
from the hub, and nothing else is downloaded; without one, the dataset is fetched once and then read from the disk.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import json
import logging
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import BadInput, DownloadFailed, NeedsExtra
from zoo.suites.tables import Dataset, RuleName

if TYPE_CHECKING:
    from PIL import Image

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".parquet", ".tsv")
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """One row, as its dataset is asked."""

    dataset: Dataset
    row: Row
    shelf: Mapping[str, Any] | None = None
    """Pictures by name, where a table of their own holds them."""

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The choices in their order; none for an open question."""
        named = self.dataset.choices
        if named is None:
            return ()
        if isinstance(named, str):
            with self._readable(named):
                value = self.row[named]
                listed = ast.literal_eval(value) if isinstance(value, str) and value else value
                return () if listed is None else tuple(str(one) for one in listed)
        return tuple(str(self.row[column]) for column in named if not _empty(self.row.get(column)))

    @property
    def text(self) -> str:
        """What is asked."""
        dataset = self.dataset
        template = dataset.prompt
        if not self.choices and dataset.open_prompt is not None:
            template = dataset.open_prompt
        listed = "\n".join(
            f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)
        )
        values = defaultdict(str, {name: value for name, value in self.row.items() if not _empty(value)})
        values["choices"] = listed
        lines = []
        for line in template.split("\n"):
            fields = [name for _, name, _, _ in string.Formatter().parse(line) if name]
            if not fields or any(values[name] != "" for name in fields):
                lines.append(line.format_map(values))
        return "\n".join(lines).strip()

    @property
    def rule(self) -> RuleName:
        """How its answer is scored."""
        dataset = self.dataset
        for condition, rule in dataset.rule_for.items():
            column, _, value = condition.partition("=")
            if str(self.row.get(column)) == value:
                return rule
        if dataset.rule == "letter" and not self._names_a_letter:
            return dataset.otherwise
        return dataset.rule

    @property
    def _names_a_letter(self) -> bool:
        if self.dataset.choices is not None:
            return bool(self.choices)
        return re.fullmatch("[A-Z]", str(self.row.get(self.dataset.answer)).strip()) is not None

    @cached_property
    def expected(self) -> tuple[str, ...]:
        """The answers that are right; for the rule letter, one letter."""
        with self._readable(self.dataset.answer):
            value = self.row[self.dataset.answer]
            if self.rule == "letter":
                if self.dataset.answer_as == "index":
                    return (LETTERS[int(value)],)
                if self.dataset.answer_as == "text":
                    return (LETTERS[self.choices.index(str(value))],)
                return (str(value).strip().upper(),)
            if isinstance(value, str) and value.startswith("[") and self.rule == "open":
                value = ast.literal_eval(value)  # several answers, written as a list
            listed = value if isinstance(value, list | tuple) else (value,)
            return tuple(str(one) for one in listed)

    @contextmanager
    def _readable(self, column: str) -> Iterator[None]:
        """Say which value cannot be understood."""
        try:
            yield
        except (ValueError, TypeError, SyntaxError, IndexError, KeyError) as error:
            raise BadInput(
                f"{self.dataset.name}: {column}={self.row.get(column)!r} cannot be understood: {_first_line(error)}"
            ) from None

    def key(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Its place in a group."""
        return tuple(self._part(name) for name in columns)

    def _part(self, column: str) -> str:
        modulo = self.dataset.modulo.get(column)
        with self._readable(column):
            return str(self.row[column] if modulo is None else int(self.row[column]) % modulo)

    def pictures(self) -> list[Image.Image]:
        """What is shown, in RGB.

        Raises:
            BadInput: something that is no picture.
        """
        held = self.dataset.pictures
        if held is not None and self.shelf is not None:
            return [_picture(self.shelf.get(str(self.row.get(held.key))), self.dataset)]
        shown = (self.row.get(column) for column in self.dataset.images)
        return [_picture(value, self.dataset) for value in shown if not _empty(value)]


def read_questions(dataset: Dataset, limit: int | None = None) -> Sequence[Question]:
    """The questions of a dataset in its order, the first ``limit`` of them.

    Raises:
        BadInput: files or columns that are not there, or no rows.
        NeedsExtra: a library that reads it is missing.
        DownloadFailed: the hub, or the dataset there, could not be reached.
    """
    if dataset.path is not None:
        rows: Sequence[Row] = _local(Path(dataset.path), dataset)[:limit]
        shelf = None
    else:
        rows = _from_hub(dataset, dataset.config, dataset.split, dataset.images, limit)
        shelf = _shelf(dataset)
    if not rows:
        raise BadInput(f"{dataset.name} has no rows")
    _check_columns(dataset, rows[0])
    return _Questions(rows, lambda row: Question(dataset, row, shelf))


class _Questions(Sequence[Any]):
    """Questions made of rows when they are needed: the rows may lie on the disk."""

    def __init__(self, rows: Sequence[Row], make: Callable[[Row], Question]) -> None:
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._make(self._rows[place])


def _check_columns(dataset: Dataset, row: Row) -> None:
    """Refuse a table that lacks a column that is asked for."""
    templates = (dataset.prompt, dataset.open_prompt or "")
    named = [name for text in templates for _, name, _, _ in string.Formatter().parse(text) if name]
    wanted = {
        *named,
        dataset.answer,
        *(dataset.per or "",),
        *(name for group in dataset.groups for name in group),
    }
    choices = dataset.choices
    wanted |= {choices} if isinstance(choices, str) else set(choices or ())
    if dataset.pictures is not None:
        wanted.add(dataset.pictures.key)
    elif not any(column in row for column in dataset.images):
        wanted |= set(dataset.images)
    missing = sorted(wanted - {*row, "choices", ""})
    if missing:
        raise BadInput(f"{dataset.name} has no column '{missing[0]}'; it has {', '.join(row)}")


# --- files ------------------------------------------------------------------------------------------------------------


def _local(path: Path, dataset: Dataset) -> list[Row]:
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not path.exists():
        raise BadInput(f"{dataset.name}: there is no {' or '.join(SUFFIXES)} at {path}")
    if files[0].suffix not in SUFFIXES:
        raise BadInput(
            f"{dataset.name}: {path} cannot be read; give {', '.join(SUFFIXES)} or a folder of such"
        )
    rows: list[Row] = []
    for file in files:
        try:
            found = _READERS[file.suffix](file)
        except (OSError, ValueError, csv.Error) as error:
            raise BadInput(f"{dataset.name}: {file} cannot be read: {_first_line(error)}") from None
        rows += [{**row, **_beside(row, dataset, file.parent)} for row in found]
    return rows


def _beside(row: Row, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Pictures that are named by a file, as paths."""
    named = {column: row.get(column) for column in dataset.images}
    return {
        column: folder / value
        for column, value in named.items()
        if isinstance(value, str) and len(value) < 512 and (folder / value).is_file()
    }


def _jsonl(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise NeedsExtra(
            "reading parquet files needs pyarrow; install it with: pip install 'efficiency-zoo[datasets]'"
        ) from None
    found: list[Row] = parquet.read_table(file).to_pylist()
    return found


def _tsv(file: Path) -> list[Row]:
    csv.field_size_limit(1 << 30)  # pictures in base64
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


_READERS: dict[str, Callable[[Path], list[Row]]] = {".jsonl": _jsonl, ".parquet": _parquet, ".tsv": _tsv}


# --- the hub ----------------------------------------------------------------------------------------------------------


def _from_hub(
    dataset: Dataset, config: str | None, split: str, images: Sequence[str], limit: int | None
) -> Sequence[Row]:
    try:
        import datasets
    except ImportError:
        raise NeedsExtra(
            f"{dataset.name} is read from the hub with the datasets library; install it with: pip install "
            "'efficiency-zoo[datasets]', or give a suite file whose datasets have a path"
        ) from None
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the last of its attempts is told below
    try:
        table = datasets.load_dataset(dataset.hub, config, split=split, streaming=limit is not None)
        for column in images:
            if column in (table.column_names or ()):
                table = table.cast_column(column, datasets.Image(decode=False))
        return table if limit is None else list(islice(table, limit))
    except Exception as error:  # whatever the library's file systems and HTTP clients raise
        raise DownloadFailed(
            f"{dataset.name} ({dataset.hub} on the hub) could not be fetched: {_first_line(error)}"
        ) from None
    finally:
        logger.setLevel(level)


def _shelf(dataset: Dataset) -> Mapping[str, Any] | None:
    held = dataset.pictures
    if held is None:
        return None
    table = _from_hub(dataset, held.config, held.split, [held.column], None)
    return {str(row[held.name]): row[held.column] for row in table}


# --- values -----------------------------------------------------------------------------------------------------------


def _empty(value: Any) -> bool:
    """Nothing, as tables write it."""
    return value is None or value != value or (isinstance(value, str) and value.strip() in ("", "nan"))


_NO_PICTURE = (OSError, TypeError, AttributeError, binascii.Error)


def _picture(value: Any, dataset: Dataset) -> Image.Image:
    """A picture from whatever a column holds: a file, bytes, base64 text, or a decoded picture."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, Mapping):  # as parquet files of the hub store pictures
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, str) and len(value) >= 512:
            value = base64.b64decode(value.partition("base64,")[2] or value)
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as opened:
            return opened.convert("RGB")
    except (*_NO_PICTURE, Image.DecompressionBombError) as error:
        raise BadInput(f"{dataset.name} holds something that is no picture: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
