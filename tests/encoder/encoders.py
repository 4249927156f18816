"""Tiny random encoders of every supported architecture, and what tests look at while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

PREFIX = {"vit": 1, "deit": 2, "clip": 1, "siglip": 0, "dinov2": 1, "dinov2-registers": 5, "beit": 1}
ENCODERS = tuple(PREFIX)
DEPTH = 4


def tiny(kind: str, *, attention: str = "sdpa", **changes: Any) -> LoadedModel:
    """``tiny-<kind>`` with 36 patches and four blocks, unless changed."""
    return LoadedModel(*tiny_model(f"tiny-{kind}", attention=attention, **changes))


def pixels(batch: int = 2, size: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def features(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Hidden states ``[B, N, D]`` after the last block, before the final norm."""
    with torch.no_grad():
        return model(pixel_values=x, output_hidden_states=True).hidden_states[-1]


@contextmanager
def lengths(loaded: LoadedModel) -> Iterator[dict[str, list[int]]]:
    """Sequence lengths that really reach the attention and the MLP of each block."""
    seen: dict[str, list[int]] = {"attention": [], "mlp": []}
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    handles = []
    for block in encoder.blocks:
        for name, module in (("attention", block.norm1), ("mlp", block.norm2)):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: seen[name].append(args[0].shape[1])
                )
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def footprint(model: Any) -> dict[str, Any]:
    """Everything a method could leave behind on the modules: attributes, hooks, configs."""
    left: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                left[f"{name}.{key}"] = tuple((kept, id(item)) for kept, item in value.items())
            else:
                left[f"{name}.{key}"] = id(value)
    return left
