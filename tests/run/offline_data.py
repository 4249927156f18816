"""Stand-ins for the packaged texts and pictures, so that nothing is fetched."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from zoo.data import load_texts as real_load_texts

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "runs",
    "away",
    "from",
    "it",
]
LINES = [" ".join(WORDS[i % 13 :] + WORDS[: i % 7]) + f", number {i}." for i in range(80)]


def load_texts(ref: Any, split: str | None = None) -> list[str]:
    """As ``zoo.data.load_texts``."""
    if ref == "news":
        return LINES[:40] if split == "calibration" else LINES[40:]
    return real_load_texts(ref)


def replace_data(patch: pytest.MonkeyPatch) -> None:
    """Let ``zoo.data`` give these texts, and gradients in place of photographs."""
    import zoo.data

    real = zoo.data.load_picture

    def load_picture(ref: object) -> Image.Image:
        if str(ref) in ("china", "flower"):
            return Image.linear_gradient("L").rotate(30 if ref == "china" else 75).convert("RGB")
        return real(str(ref))

    patch.setattr(zoo.data, "load_texts", load_texts)
    patch.setattr(zoo.data, "load_picture", load_picture)
