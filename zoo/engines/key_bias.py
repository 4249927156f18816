"""A number added to the attention logits of some keys, in all decoder layers from one on.

*Proportional attention* gives a token that stands for ``w`` others the weight of ``w`` keys: ``log w`` is added to its
logits. The bias goes into the additive mask that SDPA takes, so the kernel stays fused; it belongs to the cache of an
input, and decode steps find it there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.engines.views import View
from zoo.models.anatomy import Decoder


class KeyBias:
    """The biases of the inputs that run through a model; ``install`` puts it to work, ``close`` takes it away."""

    def __init__(self) -> None:
        self._noted: list[torch.Tensor] = []
        self._biases: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
        self._running: torch.Tensor | None = None
        self._ready: tuple[torch.Tensor | None, torch.Tensor] | None = None
        """Mask of the running forward pass as the layers get it, and with the bias."""
        self._undo: list[Callable[[], None]] = []

    def install(self, decoder: Decoder, first: int) -> None:
        """Hook the layers from ``first`` on, behind the hooks that shorten their sequence: masks must be short here.

        Args:
            decoder: with SDPA or eager attention (flash kernels take no additive mask).
            first: first layer with the bias; a stage in front of it calls ``note`` for every sample.
        """
        for number, layer in enumerate(decoder.layers[first:], start=first):
            hook = layer.module.register_forward_pre_hook(
                self._hook(number, number == first), with_kwargs=True
            )
            self._undo.append(hook.remove)
        after = decoder.module.register_forward_hook(self._forget, always_call=True)
        self._undo.append(after.remove)

    def note(self, view: View, staying: torch.Tensor, bias: torch.Tensor) -> None:
        """Say what the keys of one sample get; samples come in the order of the batch.

        Args:
            view: of the stage in front of the first layer.
            staying: numbers of the visual tokens that stay, ``[K]``.
            bias: added to their logits, ``[K]``.
        """
        places = torch.cat((view.index[staying], view.text_index))
        values = torch.cat((bias.float(), bias.new_zeros(len(view.text_index)).float()))
        self._noted.append(values[places.argsort()])

    def close(self) -> None:
        """Remove all hooks."""
        while self._undo:
            self._undo.pop()()

    def _hook(self, number: int, first: bool) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = kwargs.get("past_key_values")
            if first:
                self._begin(hidden, cache)
            if self._running is None:
                return None
            mask = kwargs.get("attention_mask")
            if self._ready is None or self._ready[0] is not mask:
                self._ready = (mask, self._biased(mask, hidden, cache, number))
            return args, {**kwargs, "attention_mask": self._ready[1]}

        return hook

    def _begin(self, hidden: torch.Tensor, cache: Any) -> None:
        """Find the bias of the running input: just noted, or noted when its cache was filled."""
        if not self._noted:
            self._running = None if cache is None else self._biases.get(cache)
            return
        bias = torch.zeros(hidden.shape[:2], device=hidden.device)
        for sample, values in enumerate(self._noted):
            bias[sample, hidden.shape[1] - len(values) :] = values  # padding stands on the left
        self._noted.clear()
        self._running = bias
        if cache is not None:
            self._biases[cache] = bias

    def _biased(
        self, mask: torch.Tensor | None, hidden: torch.Tensor, cache: Any, number: int
    ) -> torch.Tensor:
        """An additive mask ``[B, 1, Q, K]`` from none, a boolean or an additive one."""
        assert self._running is not None
        bias, lowest = self._running.to(hidden.dtype), torch.finfo(hidden.dtype).min
        queries = hidden.shape[1]
        if mask is None:
            keys = queries + (0 if cache is None else cache.get_seq_length(number))
            mask = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device).tril(keys - queries)[
                None, None
            ]
        columns = nn.functional.pad(bias, (0, mask.shape[-1] - bias.shape[1]))[:, None, None, :]
        if mask.dtype == torch.bool:
            return torch.where(mask, columns, lowest)
        return mask + columns

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = self._ready = None
        self._noted.clear()
