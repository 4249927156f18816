"""Small data for trainings that need no network."""

from __future__ import annotations

import json
from pathlib import Path

from zoo.dialogues import Dialogue

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEXTS = [" ".join(WORDS[n % 5 :] + WORDS[: n % 7]) + f" and {n} more of the same." for n in range(24)]
DIALOGUES = [Dialogue(f"Count from {n}.", " ".join(WORDS[n % 6 :])) for n in range(12)]


def jsonl(path: Path, rows: list[object]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
