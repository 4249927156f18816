"""Which tiny models there are."""

from __future__ import annotations

from zoo.models.names import KNOWN

VLMS = tuple(name for name, model in KNOWN.items() if model.kind == "vlm" and name.startswith("tiny-"))
