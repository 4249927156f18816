"""Making room in the cache of a chat between its turns, each head keeping entries of its own.

After every call each layer keeps what its queries asked for: the sum of their logits per head and key, which is one
product, ``(sum_i q_i) k_j``. Before a turn that needs room, the method says which entries stay. Positions close up: the
next token stands right behind what is left, which is why keys must hold no rotary positions.

Hooks and taps only; ``close`` removes them. State hangs on the cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from zoo.engines.latest_input import RecordsLatest
from zoo.engines.probes import Seen, tap_attention
from zoo.errors import BadInput, Refused
from zoo.models.anatomy import Decoder

Choose = Callable[[torch.Tensor, int], torch.Tensor | None]
"""From the logits of a layer, ``[B, H, 1, T]``, summed over queries, and the number of coming tokens to the entries
that stay, ``[H, K]`` ascending; ``None`` = all of them."""


class KeyEviction(RecordsLatest[tuple[list[float], int]]):
    """Installs eviction between turns on a decoder; ``close`` removes it.

    A turn begins when more than one token comes to a cache that is not empty.

    Args:
        decoder: without rotary positions, one key-value head per head.
        choose: who decides.
        reserve: tokens that a turn is expected to write, beside those it brings.
        name: for messages.
    """

    def __init__(self, decoder: Decoder, choose: Choose, reserve: int, name: str) -> None:
        self.name = name
        self.choose = choose
        self.reserve = reserve
        self._layers = len(decoder.layers)
        self._logits: dict[int, torch.Tensor] = {}
        self._gone: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """Entries that have left a cache: positions of later tokens are that much smaller."""
        self._undo: list[Callable[[], None]] = [
            decoder.module.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            decoder.module.register_forward_hook(self._after).remove,
        ]
        for index, layer in enumerate(decoder.layers):
            self._undo.append(tap_attention(layer.attention.module, partial(self._see, index)))

    def close(self) -> None:
        """Undo everything; what was recorded stays readable."""
        while self._undo:
            self._undo.pop()()

    @property
    def cached(self) -> list[float]:
        """Entries in each layer's cache when the latest call ended.

        Raises:
            BadInput: no call has run yet.
        """
        return self._finished[0]

    @property
    def read(self) -> int:
        """Tokens that went into that cache, those that have left it included."""
        return self._finished[1]

    def read_into(self, cache: DynamicCache) -> int:
        """The same for any cache."""
        return cache.get_seq_length() + self._gone.get(cache, 0)

    def _see(self, index: int, seen: Seen) -> None:
        asked = seen.query.detach().sum(2, keepdim=True, dtype=torch.float32)
        self._logits[index] = asked @ seen.key.detach().float().transpose(-1, -2) * seen.scaling

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        if cache is not None and not isinstance(cache, DynamicCache):
            raise Refused(
                f"{self.name} needs a cache that grows and shrinks; leave cache_implementation unset"
            )
        mask = kwargs.get("attention_mask")
        if len(given) > 1 or (mask is not None and not bool(torch.all(mask > 0))):
            raise BadInput(f"{self.name} in its kv mode takes one conversation at a time, without padding")
        if cache is None or not cache.get_seq_length():
            return None
        new = given.shape[1]
        if new > 1 and len(self._logits) == self._layers:
            self._make_room(cache, new + self.reserve)
        if not self._gone.get(cache):
            return None
        start = cache.get_seq_length()
        places = torch.arange(start, start + new, device=given.device).unsqueeze(0)
        return args, {**kwargs, "attention_mask": None, "position_ids": places}

    def _make_room(self, cache: DynamicCache, coming: int) -> None:
        before = cache.get_seq_length()
        for index, layer in enumerate(cache.layers):
            logits = self._logits[index]
            if logits.shape[-1] != layer.get_seq_length():
                raise BadInput(f"{self.name} did not see the latest call with this cache")
            kept = self.choose(logits, coming)
            if kept is None:
                continue
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = (entries_of(held, kept) for held in (layer.keys, layer.values))
        self._gone[cache] = self._gone.get(cache, 0) + before - cache.get_seq_length()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            lengths = [float(layer.get_seq_length()) for layer in cache.layers]
            self._latest = (lengths, self.read_into(cache))


def entries_of(held: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Some entries of a cache: ``[B, H, T, d]`` and columns ``[H, K]`` -> ``[B, H, K, d]``."""
    index = kept.to(held.device)[None, :, :, None]
    return held.gather(2, index.expand(held.shape[0], -1, -1, held.shape[3]))
