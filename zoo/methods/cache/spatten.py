"""SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning (arXiv 2012.09852, HPCA 2021).

Tokens that receive little attention and heads that put out little leave for all later layers. Within a layer, each
query may read only the values of its largest probabilities, and while text is written, scores may be computed from the
high bits of queries and keys first, and again with all bits where the result is flat. No weight is trained.

The code released later does something else, for chats: before each turn the key-value cache is cut to its beginning,
the entries that each head asked for most in the latest call, and its end. Here it is ``mode="kv"``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from zoo.engines.cascade import Cascade
from zoo.engines.key_eviction import KeyEviction
from zoo.families.text_tokens import AppliedText, AppliedTurns, TextTokenMethod, text_body
from zoo.interface import refuse, register
from zoo.methods.cache._spatten_attention import SparseAttention
from zoo.models import LoadedModel

Share = Annotated[float, Field(gt=0, le=1)]


@register("spatten")
class SpAtten(TextTokenMethod):
    """Cascade pruning of tokens and heads, local value pruning and progressive quantisation; or the released KV mode.

    Layer by layer, ``floor(n * keep)`` of the tokens and heads of the layer before enter the next one. The front of the
    model is spared; behind it ``keep`` goes linearly from its first to its last value.
    """

    default_model = "minilm"

    mode: Literal["cascade", "kv"] = Field(
        "cascade",
        description="The paper's pruning, or the released code's: the cache, between turns of a chat.",
    )
    keep_tokens: tuple[Share, Share] = Field(
        (0.95, 0.85), description="Share of its tokens that a layer passes on: at the front, at the end."
    )
    keep_heads: tuple[Share, Share] = Field(
        (1.0, 0.9), description="Share of its heads that a layer passes on: at the front, at the end."
    )
    spared_tokens: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="Front part of the layers that all tokens enter; the first layer always.",
    )
    spared_heads: float = Field(
        0.3, ge=0, lt=1, description="Front part of the layers that have all heads; the first layer always."
    )
    keep_values: float = Field(
        1.0, gt=0, le=1, description="Share of the values that each query reads; saves no time here."
    )
    bits: tuple[Annotated[int, Field(ge=2)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="High and low bits of queries, keys and values, such as 8,4; saves no time here."
    )
    tau: float = Field(0.1, ge=0, le=1, description="Low bits are read where no probability reaches this.")
    start: int = Field(4, ge=0, description="kv: entries kept at the beginning of the cache.")
    important: int = Field(128, ge=0, description="kv: entries that each head keeps for their importance.")
    recent: int = Field(
        128, ge=0, description="kv: entries kept at the end, those of the coming turn included."
    )
    reserve: int = Field(64, ge=0, description="kv: tokens that a turn may write, for which room is made.")

    @model_validator(mode="after")
    def _fits_in_numbers(self) -> SpAtten:
        if self.bits is not None and sum(self.bits) > 16:
            raise ValueError("bits sums to more than 16")
        return self

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models with rotary positions or grouped heads, and encoders in the kv mode."""
        super().check(loaded)
        if self.mode == "kv" and loaded.anatomy.decoder is None:
            raise refuse(self, "a decoder for its kv mode", f"the architecture {loaded.anatomy.description}")

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedText:
        """Hook ``loaded`` until ``close``.

        Raises:
            Refused: the model lacks what the method needs.
        """
        self.check(loaded)
        return self._between_turns(loaded) if self.mode == "kv" else self._cascade(loaded)

    def _cascade(self, loaded: LoadedModel) -> AppliedText:
        body = text_body(loaded)
        depth = len(body.layers)
        tokens = course(depth, self.spared_tokens, self.keep_tokens)
        heads = course(depth, self.spared_heads, self.keep_heads)
        attention = SparseAttention(
            self.keep_values, self.bits, self.tau, progressive=loaded.anatomy.decoder is not None
        )
        if min(*tokens, *heads, self.keep_values) == 1 and self.bits is None:  # nothing is touched
            return AppliedText(
                self, loaded, lambda: None, lambda: {"share of the tokens": (tokens, 1.0)}, dict
            )
        cascade = Cascade(body, tokens, heads, attention, self.slug)

        def bars() -> dict[str, tuple[list[float], float]]:
            return {
                "tokens": (cascade.tokens, cascade.entered),
                "heads": ([float(count) for count in cascade.heads], float(body.layers[0].attention.heads)),
            }

        def facts() -> dict[str, float | int | str]:
            share = sum(cascade.tokens) / len(cascade.tokens) / max(1.0, cascade.entered)
            found: dict[str, float | int | str] = {"tokens pruned, mean over layers": round(1 - share, 4)}
            if attention.queries:
                found["queries that needed the low bits"] = round(attention.refined / attention.queries, 4)
            return found

        return AppliedText(self, loaded, cascade.close, bars, facts)

    def _between_turns(self, loaded: LoadedModel) -> AppliedText:
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        eviction = KeyEviction(decoder, self.entries, self.reserve, self.slug)

        def bars() -> dict[str, tuple[list[float], float]]:
            return {"cache entries": (eviction.cached, float(eviction.read))}

        return AppliedTurns(self, loaded, eviction, bars)

    def entries(self, logits: torch.Tensor, coming: int) -> torch.Tensor | None:
        """Entries that stay before a turn of ``coming`` tokens, ``[H, K]``; ``None`` while there is room.

        ``logits [B, H, Q, T]`` are those of the latest call.
        """
        return cache_entries(logit_importance(logits), self.start, self.important, self.recent, coming)


def course(depth: int, spared: float, keep: tuple[float, float]) -> list[float]:
    """Share that enters each of ``depth`` layers: 1 in front, then linearly from ``keep[0]`` to ``keep[1]``."""
    front = max(1, math.ceil(depth * spared))
    steps = max(1, depth - front - 1)
    first, last = keep
    behind = [first + (last - first) * step / steps for step in range(depth - front)]
    return [1.0] * min(front, depth) + behind


def logit_importance(logits: torch.Tensor) -> torch.Tensor:
    """Logits before mask and softmax, ``[B, H, Q, T]``, summed over samples and queries: ``[H, T]``."""
    return logits.sum((0, 2))


def cache_entries(
    scores: torch.Tensor, start: int, important: int, recent: int, coming: int
) -> torch.Tensor | None:
    """The first ``start`` entries, the ``important`` best of each head, and the end of the cache.

    Room for the turn is taken out of the recent part, which begins at ``T - recent + coming``.

    Args:
        scores: ``[H, T]``.
        start, important, recent: sizes of the parts.
        coming: tokens to make room for.

    Returns:
        ``[H, K]``, ascending; ``None`` while ``T + coming`` entries fit.
    """
    heads, length = scores.shape
    if length + coming <= start + important + recent:
        return None
    end = min(length, length - recent + coming)
    best = scores[:, start:end].topk(min(important, max(0, end - start)), dim=1).indices.sort(1).values
    places = torch.arange(length, device=scores.device).expand(heads, -1)
    return torch.cat((places[:, :start], best + start, places[:, max(start, end) :]), dim=1)
