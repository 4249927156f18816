"""Queries, keys and attention that a decoder layer is about to compute, before it runs.

A stage stands in front of a layer. Some methods let that layer's own projections decide what may enter it: the rows
they need are computed here, and the layer itself runs afterwards on what is left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from zoo.engines.probes import Seen
from zoo.engines.views import View
from zoo.models.anatomy import Decoder, DecoderLayer, LinearPart


def upcoming_queries(layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """Queries of ``hidden [n, D]`` before rotary embedding, ``[H, n, d]``."""
    return _heads(layer, layer.attention.query, layer.attention.query_norm, hidden)


def upcoming_keys(layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """Keys of ``hidden [n, D]`` before rotary embedding, ``[H_kv, n, d]``."""
    return _heads(layer, layer.attention.key, layer.attention.key_norm, hidden)


def rotated(decoder: Decoder, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Queries or keys ``x [H, n, d]`` turned to ``positions`` as the decoder does it, ``[H, n, d]``.

    Args:
        decoder: with its rotary embedding.
        x: before rotary embedding.
        positions: ``[n]``, or ``[3, n]`` for places in image grids (see ``View.positions``).
    """
    if decoder.rotary is None:
        return x
    cos, sin = decoder.rotary(x, position_ids=positions.unsqueeze(-2))
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def look_ahead(view: View, decoder: Decoder, rows: torch.Tensor) -> View:
    """``view`` with the attention of the layer in front of which it stands: ``attention(view.layer, rows)`` answers.

    Args:
        view: of a stage inside the decoder.
        decoder: its layers, and the rotary embedding.
        rows: the queries that will be asked for, places in the current sequence ``[R]``; others stay zero.
    """
    layer, positions = decoder.layers[view.layer], view.positions
    places, order = torch.cat((view.index, view.text_index)).sort()
    hidden = torch.cat((view.tokens, view.text))[order]
    asked = torch.searchsorted(places, rows)
    length = int(places[-1]) + 1

    def spread(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """``x [H, n, d]`` on the whole sequence, ``[1, H, length, d]``."""
        full = x.new_zeros(1, x.shape[0], length, x.shape[2])
        full[0, :, where] = x
        return full

    query = spread(rotated(decoder, upcoming_queries(layer, hidden[asked]), positions[..., rows]), rows)
    key = spread(rotated(decoder, upcoming_keys(layer, hidden), positions[..., places]), places)
    mask = torch.zeros(1, length, dtype=torch.bool, device=places.device)
    mask[0, places] = True
    if view.weight is not None:
        seen_by = mask & torch.ones(length, length, dtype=torch.bool, device=places.device).tril()
        bias = view.weight[:length].log()
        mask = torch.where(seen_by, bias, torch.finfo(bias.dtype).min)[None, None]
    # Nobody asks for values before the layer has run: the keys stand in their place.
    seen = Seen(query, key, key, mask, layer.attention.scaling, causal=True)
    return replace(view, _sample=0, _seen={view.layer: seen})


def _heads(
    layer: DecoderLayer, part: LinearPart, norm: nn.Module | None, hidden: torch.Tensor
) -> torch.Tensor:
    x = part(layer.input_norm(hidden)).unflatten(-1, (-1, layer.attention.head_dim))
    return (x if norm is None else norm(x)).transpose(0, 1)
