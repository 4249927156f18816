"""What the tests of plans share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from taxonomy.earlier import Earlier, earlier_runs

Making = Callable[..., Path]

TINY = ("tiny-llama", "tiny-qwen2")


def own_runs() -> list[Earlier]:
    """What the test's catalogue holds."""
    return [one for one in earlier_runs(TINY) if one.own]


def stored() -> Counter[tuple[str | None, str]]:
    """How often each cell is in the test's catalogue, with each status."""
    return Counter((one.cell, one.status) for one in own_runs())
