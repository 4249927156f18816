"""Planted layers, and slow references that share no code with the search."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder
from zoo.models.tiny import tiny_model


def loaded(name: str = "tiny-llama", **changes: Any) -> LoadedModel:
    model, processor = tiny_model(name, **changes)
    model.generation_config.eos_token_id = None
    return LoadedModel(model, processor, name)


def decoder_of(model: LoadedModel) -> Decoder:
    decoder = model.anatomy.decoder
    assert decoder is not None
    return decoder


def ids(rows: int = 5, length: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def scale_layer(
    model: LoadedModel, index: int, factor: float, parts: Collection[str] = ("o", "down")
) -> None:
    """Scale what a layer adds to the residual stream: 0 makes it useless, a large factor important."""
    layer = decoder_of(model).layers[index]
    if "o" in parts:
        layer.attention.output.weight.mul_(factor)
    if "down" in parts:
        layer.mlp.down.weight.mul_(factor)


def silenced(model: Any, attention: Collection[int] = (), mlp: Collection[int] = ()) -> Any:
    """A copy whose attention or MLP of some layers adds nothing, because its last projection is zero."""
    other = copy.deepcopy(model)
    for index in attention:
        nn.init.zeros_(other.model.layers[index].self_attn.o_proj.weight)
    for index in mlp:
        nn.init.zeros_(other.model.layers[index].mlp.down_proj.weight)
    return other


@torch.no_grad()
def slow_losses(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of each window, by the model's own loss, one window at a time."""
    return torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in input_ids])


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
