"""LoRA adapters on the linear layers of a decoder: a rank per layer, trained beside frozen weights, then merged.

A thin layer over the library ``peft`` (the extra ``train``), which does the arithmetic ``W + (alpha / r) B A``. What
this adds: ranks per decoder layer, names found through the anatomy (fused projections get one adapter), and a merge
that never writes into storage shared with another model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from zoo.errors import NeedsExtra, RunFailed
from zoo.models.anatomy import Decoder


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise NeedsExtra(
            "training adapters needs peft; install it with: pip install 'efficiency-zoo[train]'"
        ) from None
    return peft


class Adapters:
    """Adapters at work on a model, from construction until ``merge`` or ``remove``.

    Args:
        model: its linear layers are wrapped in place. Weights, the caller's among them, are not written to.
        decoder: the parts of ``model``.
        ranks: of the adapters of each layer's linear modules, one number per layer; 0 for a layer without.
        alpha_per_rank: ``alpha / r``, by which the product ``B A`` is scaled.
        dropout: of the adapters' input, in training mode.
        seed: of the random start (``B`` starts at zero, so the model's outputs do not change at first). The global
            random state is neither read nor changed.

    Raises:
        NeedsExtra: peft is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        ranks: Sequence[int],
        *,
        alpha_per_rank: float = 2.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        peft = _peft()
        pattern = {
            re.escape(name): rank for name, rank in linear_ranks(model, decoder, ranks).items() if rank > 0
        }
        if not pattern:
            raise ValueError("adapters need a layer with a rank of at least 1")
        highest = max(pattern.values())
        config = peft.LoraConfig(
            r=highest,
            lora_alpha=alpha_per_rank * highest,
            lora_dropout=dropout,
            rank_pattern=pattern,
            alpha_pattern={name: alpha_per_rank * rank for name, rank in pattern.items()},
            target_modules=rf"({'|'.join(pattern)})",
        )
        before = {id(parameter) for parameter in model.parameters()}
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        device = decoder.embed.weight.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._tuner: Any = peft.LoraModel(model, config, "default")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if id(parameter) not in before
        }
        """What learns, by name; float32 also on a half-precision model."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    def merge(self) -> None:
        """Add the adapters to the weights, in new storage, and take them off: the plain model is left.

        Raises:
            RunFailed: a merged weight would not be finite; the adapters stay.
        """
        try:
            self._tuner.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise RunFailed(f"the adapters cannot be merged: {error}") from error

    def remove(self) -> None:
        """Take the adapters off: the model is as it was."""
        self._tuner.unload()


def linear_ranks(model: nn.Module, decoder: Decoder, ranks: Sequence[int]) -> dict[str, int]:
    """Name of every linear module in attention and feed-forward block of each layer, with the rank of its layer."""
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{names[part.owner]}.{part.name}": rank
        for layer, rank in zip(decoder.layers, ranks, strict=True)
        for part in layer.linears
    }


def shared_ranks(importance: Sequence[float], mean: int) -> list[int]:
    """Ranks in proportion to the importance of the layers: about ``mean`` on average, at least 1."""
    average = sum(importance) / len(importance)
    return [max(1, round(mean * value / average)) for value in importance]
