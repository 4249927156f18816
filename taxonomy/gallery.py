"""What visual-token methods keep of one photograph, recorded as text and drawn as paths of an SVG.

``docs/make_gallery.py`` writes the record; the site draws it without running a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby

from pydantic import BaseModel, ConfigDict, Field, model_validator

from taxonomy.paths import PACKAGE

FOLDER = PACKAGE / "gallery"
"""Holds ``gallery.json`` and ``photo.jpg``."""


class Drawing(BaseModel):
    """One method's choice. Patches are bits in raster order, the first one highest, as a hexadecimal number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: str = Field(description="Hyper-parameters that are not the defaults, for people.")
    kept: str = Field(pattern="^[0-9a-f]+$", description="Patches whose token stays.")
    merged: str = Field(pattern="^[0-9a-f]+$", description="Patches whose token goes on in another one.")


class Gallery(BaseModel):
    """All choices on one photograph."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    photo: str = Field(description="What the photograph is, and who made it.")
    licence: str
    model: str
    question: str
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    methods: dict[str, Drawing] = Field(description="By slug.")

    @model_validator(mode="after")
    def _bits_fit(self) -> Gallery:
        for slug, drawing in self.methods.items():
            for bits in (drawing.kept, drawing.merged):
                if int(bits, 16) >> (self.rows * self.columns):
                    raise ValueError(f"{slug} has more patches than the photograph")
        return self

    def flags(self, bits: str) -> list[bool]:
        """One flag per patch, in raster order."""
        number, size = int(bits, 16), self.rows * self.columns
        return [bool(number >> (size - 1 - place) & 1) for place in range(size)]

    def counts(self, slug: str) -> tuple[int, int, int]:
        """Patches of a method that are kept, merged, and all."""
        drawing = self.methods[slug]
        return (
            int(drawing.kept, 16).bit_count(),
            int(drawing.merged, 16).bit_count(),
            self.rows * self.columns,
        )

    def left_path(self, slug: str) -> str:
        """The patches that are neither kept nor merged, as a path in units of patches."""
        drawing = self.methods[slug]
        kept, merged = self.flags(drawing.kept), self.flags(drawing.merged)
        return self._path([not (a or b) for a, b in zip(kept, merged, strict=True)])

    def merged_path(self, slug: str) -> str:
        """The patches that were merged into others, likewise."""
        return self._path(self.flags(self.methods[slug].merged))

    def _path(self, flags: Sequence[bool]) -> str:
        return "".join(self._runs(flags))

    def _runs(self, flags: Sequence[bool]) -> Iterator[str]:
        """A rectangle for each run of neighbours in a row."""
        for row in range(self.rows):
            line = flags[row * self.columns : (row + 1) * self.columns]
            start = 0
            for marked, run in groupby(line):
                length = len(list(run))
                if marked:
                    yield f"M{start} {row}h{length}v1h-{length}z"
                start += length


def bits_of(flags: Sequence[bool]) -> str:
    """Flags in raster order as a hexadecimal number."""
    return f"{int(''.join('01'[flag] for flag in flags), 2):0{-(-len(flags) // 4)}x}"


@cache
def load_gallery() -> Gallery:
    """The recorded gallery.

    Raises:
        ValueError: the record is damaged.
    """
    return Gallery.model_validate_json((FOLDER / "gallery.json").read_text(encoding="utf-8"))
