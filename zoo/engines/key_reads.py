"""Decode steps that read only some of the cached keys.

The cache stays whole: in each step the attention that one layer pays with the new token decides which keys of the
prompt the deeper layers read, and a key that is passed over now may be read in the next step. Those layers gather keys
and values in front of the kernel (SDPA, flash), which then runs on the short ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.engines.kernels import put_in_front, run_kernel
from zoo.engines.probes import Seen, tap_attention
from zoo.engines.views import View
from zoo.models.anatomy import Decoder

Gate = Callable[[torch.Tensor], "torch.Tensor | None"]
"""From the attention of the new token to the candidates, mean over heads ``[I]``, to those that are read, ``[I]`` bool;
``None`` = all. Called once per decode step of one sample, in order."""


@dataclass
class _Input:
    """One input: which keys of its prompt may be passed over, and what decides, per sample."""

    candidates: list[torch.Tensor]
    gates: list[Gate]


class KeyReads:
    """The choice of keys for all inputs that run through a model.

    Args:
        new_gate: makes the gate of one sample.
    """

    def __init__(self, new_gate: Callable[[], Gate]) -> None:
        self._new_gate = new_gate
        self._noted: dict[int, tuple[int, torch.Tensor]] = {}
        self._inputs: weakref.WeakKeyDictionary[Any, _Input] = weakref.WeakKeyDictionary()
        self._running: _Input | None = None
        self._chosen: tuple[torch.Tensor, torch.Tensor] | None = None
        """Keys read by the deeper layers in this step ``[B, M]``, and which of these entries are real."""
        self._undo: list[Callable[[], None]] = []
        self.steps = 0
        """Decode steps of all samples of the latest input."""
        self.passed_over = 0
        """Keys not read in these steps, per layer, summed."""

    def install(self, decoder: Decoder, first: int) -> None:
        """Observe layer ``first - 1``; layers from ``first`` on read what is chosen."""
        try:
            watching = decoder.layers[first - 1]
            begin = watching.module.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._undo.append(begin.remove)
            self._undo.append(tap_attention(watching.attention.module, self._choose))
            for layer in decoder.layers[first:]:
                self._undo.append(_gather_in(layer.attention.module, self._gathered))
            after = decoder.module.register_forward_hook(self._forget, always_call=True)
            self._undo.append(after.remove)
        except BaseException:
            self.close()
            raise

    def note(self, view: View, staying: torch.Tensor, candidates: torch.Tensor) -> None:
        """Say which keys of one sample may be passed over; call it in a stage before the LLM.

        Args:
            view: of that stage.
            staying: numbers of the visual tokens that stay, in their new order ``[K]``.
            candidates: which of them may be passed over, ``[K]`` bool.
        """
        # Visual tokens keep their order within a run, and runs that of the prompt: so do the candidates' places.
        places = torch.cat((view.index[staying].sort().values, view.text_index))
        flags = torch.cat((candidates, torch.zeros_like(view.text_index, dtype=torch.bool)))
        self._noted[view.sample] = (len(places), flags[places.argsort()].nonzero().squeeze(-1))

    def close(self) -> None:
        """Take everything away."""
        while self._undo:
            self._undo.pop()()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the input that is running: its candidates were just noted, or when its cache was filled."""
        hidden, cache = args[0] if args else kwargs["hidden_states"], kwargs.get("past_key_values")
        self._running = self._chosen = None
        if cache is None:
            return
        if self._noted:
            batch, length = hidden.shape[:2]
            candidates = [torch.empty(0, dtype=torch.long, device=hidden.device)] * batch
            for sample, (own, places) in self._noted.items():
                candidates[sample] = places + (length - own)  # padding stands on the left
            self._inputs[cache] = _Input(candidates, [self._new_gate() for _ in range(batch)])
            self.steps = self.passed_over = 0
        elif hidden.shape[1] == 1:
            self._running = self._inputs.get(cache)

    def _choose(self, seen: Seen) -> None:
        if self._running is None:
            return
        first = torch.zeros(1, dtype=torch.long, device=seen.query.device)
        read = torch.ones(seen.key.shape[0], seen.key.shape[2], dtype=torch.bool, device=seen.key.device)
        for sample, candidates in enumerate(self._running.candidates):
            if len(candidates):
                row = seen.rows(sample, first)[:, 0].mean(0)
                chosen = self._running.gates[sample](row[candidates])
                self.steps += 1
                if chosen is not None:
                    read[sample, candidates] = chosen
        counts = read.sum(1)
        longest = int(counts.max())
        self.passed_over += int((read.shape[1] - counts).sum())
        if int(counts.min()) < read.shape[1]:
            index = read.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
            self._chosen = (index, torch.arange(longest, device=index.device) < counts.unsqueeze(1))

    def _gathered(
        self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, flash: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The keys of this step, ``[B, H_kv, M, d]``, their values, and the mask for the kernel."""
        if self._chosen is None:
            return key, value, mask
        index, real = self._chosen
        places = index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        key, value = key.gather(2, places), value.gather(2, places)
        if mask is not None and mask.dim() == 4:
            columns = index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
            mask = mask.expand(len(index), -1, -1, -1).gather(3, columns)
            hidden = ~real[:, None, None, :]
            lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return key, value, mask.masked_fill(hidden, lowest)
        if mask is not None:
            return key, value, mask.gather(1, index) * real.to(mask.dtype)
        if bool(real.all()):
            return key, value, None
        if flash:
            return key, value, real.long()
        allowed = real[:, None, None, :]
        return key, value, allowed

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = self._chosen = None
        self._noted.clear()


_PREFIX = "zoo_gathered_"
_Gathering = Callable[
    [torch.Tensor, torch.Tensor, "torch.Tensor | None", bool],
    "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]",
]
_gathering: weakref.WeakKeyDictionary[nn.Module, _Gathering] = weakref.WeakKeyDictionary()


def _gather_in(module: nn.Module, gathered: _Gathering) -> Callable[[], None]:
    """Let ``module`` run its kernel on what ``gathered`` returns; returns the function that undoes it."""
    config = put_in_front(module, _PREFIX, _gathering_forward)
    _gathering[module] = gathered
    return partial(_restore, module, config)


def _gathering_forward(
    base: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """Gather keys and values, and run the kernel ``base`` on them."""
    gather = _gathering.get(module)
    if gather is not None:
        key, value, attention_mask = gather(key, value, attention_mask, "flash" in base)
        if "eager" in base and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
                ~attention_mask, torch.finfo(query.dtype).min
            )
    return run_kernel(base, module, query, key, value, attention_mask, **kwargs)


def _restore(module: nn.Module, config: Any) -> None:
    module.config = config
    _gathering.pop(module, None)
