from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from zoo.image_data import ImageSplit
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model
from zoo.reference import assembly, canvases


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, canvases.Pixels]:
    """Made-up pictures, three of each name, in place of the packaged ones."""
    random = np.random.default_rng(0)
    pictures = {name: random.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8) for name in canvases.NAMES}

    def made_up(split: ImageSplit) -> dict[str, canvases.Pixels]:
        return pictures

    monkeypatch.setattr(canvases, "_library", made_up)
    return pictures


@pytest.fixture
def parts() -> Callable[[], tuple[LoadedModel, LoadedModel]]:
    """Tiny stand-ins of the packaged models, new ones on every call."""

    def make() -> tuple[LoadedModel, LoadedModel]:
        encoder = tiny_model("tiny-dinov2", num_hidden_layers=8, patch_size=14, image_size=56)
        language = tiny_model("tiny-llama", tie_word_embeddings=True)
        return LoadedModel(*encoder, ref="encoder"), LoadedModel(*language, ref="language")

    return make


@pytest.fixture
def assembled(parts: Callable[[], tuple[LoadedModel, LoadedModel]]) -> tuple[Any, Any]:
    """Model and processor."""
    return assembly.assemble(*parts())
