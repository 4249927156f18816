"""Held-out text on which quality is measured; calibration never sees it."""

from __future__ import annotations

from typing import Any

import torch

from zoo import data
from zoo.bench.settings import Settings
from zoo.errors import BadInput
from zoo.models import LoadedModel
from zoo.runner.inputs import context
from zoo.runner.request import CALIBRATION_LENGTH


def heldout_windows(loaded: LoadedModel, settings: Settings) -> tuple[torch.Tensor, str]:
    """Consecutive windows of the packaged held-out news: ids ``[windows, T]`` and their description.

    Raises:
        BadInput: the model has no tokenizer, or the text is shorter than a window.
    """
    ids = _ids(loaded, "\n\n".join(data.load_texts("news", split="heldout")))
    length = min(settings.window, context(loaded))
    count = min(settings.windows, len(ids) // length)
    if count < 1:
        raise BadInput(f"the held-out text has {len(ids)} tokens, fewer than one window of {length}")
    return torch.tensor(ids[: count * length]).view(count, length), f"news, {count} x {length} tokens"


def heldout_passages(loaded: LoadedModel, most: int | None = None) -> tuple[torch.Tensor, str]:
    """Beginnings of packaged held-out news items, at least half of all: ids ``[items, T]``, description.

    Args:
        loaded: its tokenizer is used.
        most: take no more than the first so many.

    Raises:
        BadInput: the model has no tokenizer.
    """
    items = _ids(loaded, data.load_texts("news", split="heldout"))
    middle = sorted(len(item) for item in items)[len(items) // 2]
    length = min(CALIBRATION_LENGTH, context(loaded) - 2, middle)
    ids = torch.tensor([item[:length] for item in items if len(item) >= length][:most])
    return ids, f"news, {len(ids)} items, {length} tokens of each"


def _ids(loaded: LoadedModel, text: str | list[str]) -> Any:
    """Ids of a text, or of each of several, without special tokens."""
    if loaded.tokenizer is None:
        raise BadInput(f"{loaded.ref} has no tokenizer, so there is no text to measure it on")
    return loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
