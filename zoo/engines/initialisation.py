"""Weights as they are before any training."""

from __future__ import annotations

import copy
from typing import Any

import torch


def draw_initial_weights(model: Any, seed: int) -> None:
    """Give every parameter the value that the model's own class draws before training.

    New storage takes the place of the old, which is not written to. The global random state is left as it was.

    Args:
        model: transformers model; its parameters keep their type, device and ties.
        seed: of the draw. The same seed and configuration give the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        drawn = dict(type(model)(copy.deepcopy(model.config)).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = drawn[name].data.to(parameter.device, parameter.dtype)
