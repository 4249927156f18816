"""Cascade pruning: what leaves a text model in one layer, tokens or attention heads, is gone in all later ones.

The importance of a token is the attention probability that it has received so far, that of a head the magnitude of what
it has put out so far (SpAtten, arXiv 2012.09852, section III). Both are added up over layers and, while text is
generated, over steps; behind each layer the least important leave.

- A token that leaves is not a query, key or value any more, and no feed-forward block sees it. Where there is a cache,
  its entry is not made or, in later steps, taken out. At the end every position is there again: a token that left has
  the hidden state with which it left, so that heads and poolers find their full length.
- A head that leaves has no projections any more: the rows of query, key and value and the columns of the output
  projection are sliced before they are used. Each sample has heads of its own. They are settled with the prompt,
  because a head without cached keys cannot come back.

While a cascade is installed, attention modules have a ``forward`` of their own and layers a hook; ``close`` takes them
away. Classes are never touched. All state of an input lives in a pass, which a cache leads back to.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from zoo.engines.latest_input import RecordsLatest
from zoo.engines.reductions import Keep
from zoo.errors import Refused
from zoo.models.anatomy import Attention, Decoder, LinearPart, TextEncoder

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
]
"""From query ``[B, H, Q, d]``, key and value ``[B, H, K, d]``, the keys that each query may see ``[B, 1, Q, K]`` (bool)
and the scaling of the products: what each head puts out, ``[B, H, Q, d]``, and its probabilities, ``[B, H, Q, K]``."""


@dataclass
class _Pass:
    """One input, from its first layer to its last token. ``T`` tokens so far, ``R`` rows in the layer under way."""

    rows: torch.Tensor
    """Places of the rows, ``[B, R]``."""
    there: torch.Tensor
    """Rows that are tokens and not padding, ``[B, R]`` bool."""
    importance: torch.Tensor
    """Of tokens, ``[B, T]`` float32."""
    head_importance: torch.Tensor
    """``[B, H]`` float32."""
    attended: torch.Tensor
    """Tokens that were keys in the layer before, ``[B, T]`` bool."""
    prompt: bool = True
    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    """Heads of each layer that has lost some, ``[B, h]`` ascending."""
    cached: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Places of the entries in each layer's cache, and which are tokens: ``[B, C]`` each."""
    full: torch.Tensor | None = None
    """Hidden states with which tokens left, ``[B T + 1, D]``: the last row is for what is no token."""
    tokens: list[float] = field(default_factory=list)
    """Tokens that entered each layer with the prompt, mean over the batch."""
    entered: float = 0.0
    heads_used: list[int] = field(default_factory=list)


class Cascade(RecordsLatest[_Pass]):
    """Installs cascade pruning on the layers of a text model; ``close`` removes it.

    Args:
        body: a BERT-like encoder or a GPT-2-like decoder: no rotary positions, one key-value head per head.
        keep_tokens: for each layer, the fraction of the tokens of the layer before that enters it.
        keep_heads: likewise for heads.
        attend: how attention is computed.
        name: who prunes, for messages.
    """

    def __init__(
        self,
        body: Decoder | TextEncoder,
        keep_tokens: Sequence[float],
        keep_heads: Sequence[float],
        attend: Attend,
        name: str,
    ) -> None:
        self.name = name
        self.causal = not isinstance(body, TextEncoder)
        self.layers = body.layers
        self.keep_tokens = list(keep_tokens)
        self.keep_heads = list(keep_heads)
        self.attend = attend
        self._passes: weakref.WeakKeyDictionary[Any, _Pass] = weakref.WeakKeyDictionary()
        self._current: _Pass | None = None
        self._undo: list[Callable[[], None]] = []
        for index, layer in enumerate(body.layers):
            self._replace(layer.attention.module, partial(self._attention, index, layer.attention))
            if layer.attention.output.owner is not layer.attention.module:
                # The output projection stands outside; ours is done before.
                self._replace(layer.attention.output.linear, _identity)
            self._undo.append(layer.module.register_forward_hook(partial(self._after, index)).remove)

    def close(self) -> None:
        """Undo everything; what was recorded stays readable."""
        while self._undo:
            self._undo.pop()()

    @property
    def tokens(self) -> list[float]:
        """Tokens of the prompt that entered each layer, mean over the samples of the latest input.

        Raises:
            BadInput: no input has run yet.
        """
        return self._finished.tokens

    @property
    def entered(self) -> float:
        """Tokens of the prompt, mean over the samples of the latest input."""
        return self._finished.entered

    @property
    def heads(self) -> list[int]:
        """Heads at work in each layer."""
        return self._finished.heads_used

    @property
    def entries(self) -> list[list[list[int]]]:
        """Places of the tokens in each layer's cache, by sample; empty without a cache."""
        return [
            [row[real].tolist() for row, real in zip(places, valid, strict=True)]
            for places, valid in self._finished.cached.values()
        ]

    @property
    def importance(self) -> torch.Tensor:
        """Attention probability that each token has received so far, ``[B, T]`` float32."""
        return self._finished.importance

    # --- one layer -------------------------------------------------------------------------------------------------

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._undo.append(partial(vars(module).pop, "forward", None))

    def _attention(
        self,
        index: int,
        attention: Attention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        """Stands for the forward of an attention module: ``[B, R, D]`` -> ``[B, R, D]``, output projection included."""
        if encoder_hidden_states is not None:
            raise Refused(f"{self.name} does not support cross-attention")
        current = self._enter(index, hidden_states, attention_mask, past_key_values)
        heads = current.heads.get(index)
        query, key, value = (
            _project(part, hidden_states, heads, attention.head_dim)
            for part in (attention.query, attention.key, attention.value)
        )
        places, there = current.rows, current.there
        if past_key_values is not None:
            if index in current.cached:
                if past_key_values.layers[index].get_seq_length() != current.cached[index][0].shape[1]:
                    raise Refused(
                        f"{self.name} cannot share its cache with a method that cuts it, such as a drafter"
                    )
                self._evict(current, index, past_key_values)
                before, valid = current.cached[index]
                places, there = torch.cat((before, places), 1), torch.cat((valid, there), 1)
            key, value = past_key_values.update(key, value, index)
            current.cached[index] = (places, there)
        allowed = there[:, None, None, :]
        if self.causal:
            allowed = allowed & (places[:, None, None, :] <= current.rows[:, None, :, None])
        asking = current.there[:, None, None, :].float()
        outputs, received = [], torch.zeros_like(places, dtype=torch.float32)
        for some in _head_slices(query, key):
            output, probabilities = self.attend(
                query[:, some], key[:, some], value[:, some], allowed, attention.scaling
            )
            outputs.append(output)
            received += (asking @ probabilities.detach().float()).sum((1, 2))
        output = torch.cat(outputs, 1)
        self._add_up(current, heads, places, there, output, received)
        return _merge(attention.output, output, heads), None

    def _enter(self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> _Pass:
        if index == 0:
            if cache is not None and not isinstance(cache, DynamicCache):
                raise Refused(
                    f"{self.name} needs a cache that grows and shrinks; leave cache_implementation unset"
                )
            known = None if cache is None else self._passes.get(cache)
            if known is None and cache is not None and cache.get_seq_length():
                raise Refused(f"{self.name} must see the whole prompt: this cache was filled without it")
            current = self._current = self._begin(known, hidden, mask)
            if cache is not None:
                self._passes[cache] = current
        assert self._current is not None
        return self._current

    def _begin(self, known: _Pass | None, hidden: torch.Tensor, mask: torch.Tensor | None) -> _Pass:
        batch, new = hidden.shape[:2]
        there = torch.ones(batch, new, dtype=torch.bool, device=hidden.device)
        if mask is not None:
            last = mask[:, 0, -1] if mask.dim() == 4 else mask  # the last query sees every token before it
            seen = last if last.dtype == torch.bool else (last >= 0 if mask.dim() == 4 else last > 0)
            there = seen[:, -new:].expand(batch, -1)
        before = 0 if known is None else known.importance.shape[1]
        rows = torch.arange(before, before + new, device=hidden.device).expand(batch, -1)
        fresh = torch.zeros(batch, new, device=hidden.device)
        if known is None:
            scores = fresh.new_zeros(batch, self.layers[0].attention.heads)
            current = _Pass(rows, there, fresh, scores, torch.zeros_like(there))
            current.entered = float(there.sum(1).float().mean())
            return current
        known.rows, known.there, known.prompt = rows, there, False
        known.importance = torch.cat((known.importance, fresh), 1)
        known.attended = torch.zeros_like(known.importance, dtype=torch.bool)
        return known

    @torch.no_grad()
    def _add_up(
        self,
        current: _Pass,
        heads: torch.Tensor | None,
        places: torch.Tensor,
        there: torch.Tensor,
        output: torch.Tensor,
        received: torch.Tensor,
    ) -> None:
        """``s_t += sum_h sum_i P`` (``received [B, K]``) and ``s_h += sum_i sum_d |E|``, over queries that are no
        padding.
        """
        current.importance.scatter_add_(1, places, received * there)
        asking = current.there[:, None, None, :].float()
        magnitude = (asking @ output.float().abs()).sum((2, 3))
        chosen = torch.arange(magnitude.shape[1], device=magnitude.device).expand_as(magnitude)
        current.head_importance.scatter_add_(1, chosen if heads is None else heads, magnitude)
        attended = torch.zeros_like(current.importance).scatter_add(1, places, there.float())
        current.attended = attended > 0
        if current.prompt:
            current.tokens.append(float(current.there.sum(1).float().mean()))
            current.heads_used.append(output.shape[1])

    # --- who leaves ------------------------------------------------------------------------------------------------

    def _evict(self, current: _Pass, index: int, cache: DynamicCache) -> None:
        """Cut the cache of a layer, before new tokens join it, to what the cascade lets through."""
        if index == 0:
            return
        places, valid = current.cached[index]
        candidates = valid & current.attended.gather(1, places)
        allowed = kept_count(current.attended.sum(1), self.keep_tokens[index]) - current.there.sum(1)
        count = torch.minimum(candidates.sum(1), allowed.clamp(min=0))
        if torch.equal(count, valid.sum(1)):
            return
        kept, flag = strongest(current.importance.gather(1, places), candidates, count, padding_first=True)
        layer = cache.layers[index]
        assert layer.keys is not None
        assert layer.values is not None
        entries = kept[:, None, :, None]
        layer.keys = layer.keys.gather(2, entries.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(
            2, entries.expand(-1, layer.values.shape[1], -1, layer.values.shape[3])
        )
        current.cached[index] = (places.gather(1, kept), flag)

    def _after(self, index: int, module: nn.Module, args: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        """Behind a layer: ``[B, R, D]``, shorter when tokens leave; behind the last one at full length again."""
        current = self._current
        assert current is not None
        if index + 1 < len(self.layers):
            if not current.prompt:
                return None
            self._choose_heads(current, index + 1)
            return self._shorten(current, index + 1, hidden)
        self._latest, self._current = current, None
        if current.full is None:
            return None
        full, current.full = _placed(current, hidden), None
        return full[:-1].view(len(hidden), -1, hidden.shape[-1])

    def _choose_heads(self, current: _Pass, index: int) -> None:
        before = current.heads.get(index - 1)
        present = current.head_importance.shape[1] if before is None else before.shape[1]
        count = max(1, math.floor(present * self.keep_heads[index] + _ROUNDING))
        scores = current.head_importance if before is None else current.head_importance.gather(1, before)
        if count == present:
            if before is not None:
                current.heads[index] = before
            return
        kept = scores.topk(count, dim=1).indices.sort(1).values
        current.heads[index] = kept if before is None else before.gather(1, kept)

    def _shorten(self, current: _Pass, index: int, hidden: torch.Tensor) -> torch.Tensor | None:
        if self.keep_tokens[index] == 1:
            return None
        scores = current.importance.gather(1, current.rows)
        # Never [CLS], never the token that the next one is predicted from.
        guarded = current.there.float().argmax(1)
        if self.causal:
            guarded = (current.there * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
        scores = scores.scatter(1, guarded.unsqueeze(1), torch.inf)
        count = kept_count(current.there.sum(1), self.keep_tokens[index])
        if torch.equal(count, current.there.sum(1)):
            return None
        kept, flag = strongest(scores, current.there, count, padding_first=self.causal)
        current.full = _placed(current, hidden)
        current.rows, current.there = current.rows.gather(1, kept), flag
        return Keep(kept).apply(hidden)


_ROUNDING = 1e-6
"""``0.29 * 100`` is a little less than 29."""


def kept_count(tokens: torch.Tensor, keep: float) -> torch.Tensor:
    """``floor(n * keep)`` for each sample, at least 1 where there is a token: ``[B]`` -> ``[B]``."""
    counts = torch.floor(tokens.double() * keep + _ROUNDING).long()
    return torch.maximum(counts, tokens.clamp(max=1))


def strongest(
    scores: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor, *, padding_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` candidates with the highest scores, in their order; of equals the earlier ones.

    Args:
        scores: ``[B, N]``.
        candidates: ``[B, N]`` bool, at least ``count`` of each row.
        count: ``[B]``.
        padding_first: where rows shorter than the longest are filled up, in front or behind.

    Returns:
        Columns ``[B, K]`` and which of them are no filling, ``[B, K]`` bool; ``K`` is the largest count.
    """
    ranked = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    width = int(count.max())
    kept = ranked[:, :width]
    real = torch.arange(width, device=scores.device) < count.unsqueeze(1)
    order = kept.masked_fill(~real, -1 if padding_first else scores.shape[1]).argsort(dim=1, stable=True)
    return kept.gather(1, order), real.gather(1, order)


def _placed(current: _Pass, hidden: torch.Tensor) -> torch.Tensor:
    """States of all positions: those of the rows where they are, else those with which tokens left.

    As ``current.full``, which is written to.
    """
    if current.full is None:
        return torch.cat((hidden.flatten(0, 1), hidden[:1, 0]))
    batch, tokens = current.importance.shape
    first = torch.arange(0, batch * tokens, tokens, device=hidden.device).unsqueeze(1)
    target = torch.where(current.there, current.rows + first, batch * tokens)
    return current.full.index_copy_(0, target.flatten(), hidden.flatten(0, 1))


_MAPS = 2**18
"""Numbers of attention that are computed at once on a CPU, so that they stay in the cache."""


def _head_slices(query: torch.Tensor, key: torch.Tensor) -> list[slice]:
    """Heads of ``query [B, H, Q, d]`` whose maps are computed together: a few on a CPU, else all."""
    batch, heads, queries, _ = query.shape
    count = max(1, _MAPS // (batch * queries * key.shape[2])) if query.device.type == "cpu" else heads
    return [slice(first, first + count) for first in range(0, heads, count)]


def _project(part: LinearPart, x: torch.Tensor, heads: torch.Tensor | None, width: int) -> torch.Tensor:
    """``x [B, R, D]`` through the rows of some heads: ``[B, h, R, d]``."""
    if heads is None:
        return part(x).unflatten(-1, (-1, width)).transpose(1, 2)
    weight = part.weight.unflatten(0, (-1, width)).index_select(0, heads.flatten())
    weight = weight.view(len(heads), -1, x.shape[-1])  # [B, h d, D]
    if part.bias is None:
        projected = x @ weight.mT
    else:
        bias = part.bias.view(-1, width)[heads].flatten(1)
        projected = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return projected.unflatten(-1, (-1, width)).transpose(1, 2)


def _merge(part: LinearPart, output: torch.Tensor, heads: torch.Tensor | None) -> torch.Tensor:
    """What heads put out, ``[B, h, R, d]``, through their columns of the output projection: ``[B, R, D]``."""
    merged = output.transpose(1, 2).flatten(2)
    if heads is None:
        return F.linear(merged, part.weight, part.bias)
    columns = part.weight.unflatten(1, (-1, output.shape[-1])).index_select(1, heads.flatten())
    columns = columns.view(len(columns), len(heads), -1).permute(1, 2, 0)  # [B, h d, D]
    return merged @ columns if part.bias is None else torch.baddbmm(part.bias, merged, columns)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x
