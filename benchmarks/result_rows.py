"""The file a sweep writes its rows to, one JSON object per line, so that it can be cut short and go on later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def finished(path: Path) -> list[dict[str, Any]]:
    """The rows of ``path``; a line cut off by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows; ``path`` is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
