"""Helpers of the tests of sparsifying and uniform methods: models, calibration ids, slow statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder
from zoo.models.tiny import tiny_model

MODELS = (
    "tiny-llama",
    "tiny-llama-mha",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-mistral",
    "tiny-gemma3",
    "tiny-phi3",
)


def build(name: str = "tiny-llama", dtype: torch.dtype = torch.float32, **changes: Any) -> LoadedModel:
    model, processor = tiny_model(name, **changes)
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return LoadedModel(model, processor, name)


def decoder_of(loaded: LoadedModel) -> Decoder:
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    return decoder


def ids(rows: int = 6, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def linears(model: Any) -> dict[str, nn.Linear]:
    """All linear layers of the decoder layers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }


@torch.no_grad()
def inputs_of(model: Any, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters each linear layer in a plain forward pass, ``[windows, tokens, in]``."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in linears(model).items()
    ]
    model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=windows).logits


def distance(model: Any, dense: Any, windows: torch.Tensor) -> float:
    """How far the predictions are from the dense model's: mean KL in nats."""
    log_p, log_q = (logits(one, windows).log_softmax(-1) for one in (dense, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@torch.no_grad()
def loud_inputs(loaded: LoadedModel, factor: float = 30.0) -> None:
    """Make a few inputs of every linear behind a norm much larger and their weights as much smaller.

    The function stays the same; magnitude takes these weights for unimportant, activations tell otherwise.
    """
    for layer in decoder_of(loaded).layers:
        for norm, name in ((layer.input_norm, "attention"), (layer.post_norm, "mlp")):
            norm.weight[::8] *= factor
            for part in layer.by_input[name]:
                part.weight[:, ::8] /= factor
