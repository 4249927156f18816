"""Running the layers of a decoder by hand: with which arguments, on which device, some of them replaced for a while.

Transformers computes masks, positions and rotary embeddings once per forward pass and hands them to every layer.
``layer_arguments`` asks for them without running a layer, so an engine can then run layers one at a time, leave some
out, or run one of them twice. Everything here is undone on exit, exceptions included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from zoo.models.anatomy import Decoder


def layer_arguments(
    decoder: Decoder, input_ids: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """What enters the first layer, and with which keyword arguments each layer would be called.

    Args:
        decoder: its layers stand still while the inner model runs.
        input_ids: ``[batch, tokens]``.
        valid: ``[batch, tokens]`` bool, false for padding; ``None`` when there is none.

    Returns:
        Hidden states ``[batch, tokens, hidden]`` and one dictionary per layer.
    """
    entered: list[torch.Tensor] = []
    arguments: list[dict[str, Any]] = []

    def stand_still(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        entered.append(hidden_states)
        arguments.append(kwargs)
        return hidden_states

    inputs: dict[str, Any] = {}
    if valid is not None:
        inputs["attention_mask"] = valid.long()
        inputs["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
    with ExitStack() as undo:
        for layer in decoder.layers:
            undo.enter_context(forward_replaced(layer.module, stand_still))
        decoder.module(input_ids=input_ids, use_cache=False, **inputs)
    return entered[0], arguments


def run_layer(module: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Output ``[batch, tokens, hidden]`` of one decoder layer; some layers wrap it in a tuple."""
    output = module(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let this one module run ``forward``; the class is untouched, the instance restored."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have ``module`` on ``device`` for a while.

    What was there before is put back, not copied back; tensors that appeared meanwhile (a pruned layer's) follow home.
    """
    before = {id(tensor): (tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())}
    homes = {data.device for _, data in before.values()}
    if homes <= {device}:
        yield
        return
    home = next(iter(homes))
    try:
        for tensor, data in before.values():
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in before.values():
            tensor.data = data
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in before:
                tensor.data = tensor.data.to(home)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with the tensors nested in it on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    return value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``eval`` mode (no dropout) for a while."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True
