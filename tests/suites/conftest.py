"""A suite of made-up questions on this machine, and a catalogue of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from suite_files import SUITE, write_rows


@pytest.fixture(autouse=True)
def catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "runs.sqlite"
    monkeypatch.setenv("ZOO_CATALOG", str(file))
    return file


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    """``mini.toml`` with its data beside it."""
    folder = tmp_path / "mini"
    folder.mkdir()
    for place, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40 + 8 * place, 48), colour).save(folder / f"{colour}.png")
    shown = ("red.png", "blue.png")
    write_rows(
        folder / "colours.jsonl",
        [
            {
                "question": f"Is it red, {number}?",
                "answer": ("Yes", "No")[place],
                "image": shown[place],
                "kind": ("plain", "odd")[number // 2],
                "number": number,
            }
            for number in range(3)
            for place in range(2)
        ],
    )
    (folder / "shapes").mkdir()
    for part in range(2):
        write_rows(
            folder / "shapes" / f"part-{part}.jsonl",
            [
                {
                    "question": "Which colour is it?",
                    "hint": None if part else "It is one colour.",
                    "options": ["red", "blue"],
                    "answer": part,
                    "image": f"../{shown[part]}",
                }
            ],
        )
    write_rows(
        folder / "signs.jsonl",
        [{"question": "What does it say?", "answers": ["stop", "halt"], "image": shown[0]}] * 2,
    )
    file = folder / "mini.toml"
    file.write_text(SUITE, encoding="utf-8")
    return file
