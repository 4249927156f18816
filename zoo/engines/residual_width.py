"""Removing channels of the residual stream: every matrix, norm and embedding of a decoder becomes narrower at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.engines.surgery import Cuts
from zoo.models.anatomy import Decoder


@torch.no_grad()
def keep_residual_channels(decoder: Decoder, kept: torch.Tensor) -> None:
    """Keep some channels of the residual stream. Nothing is rescaled; tied embeddings stay tied.

    Args:
        decoder: of a plain causal LM (what feeds a decoder from outside, as a projector does, would not fit any more);
            its modules are changed, no parameter is written to.
        kept: mask ``[hidden]``.

    Raises:
        ValueError: the mask has another length, or keeps nothing.
    """
    if kept.shape != (decoder.hidden_size,) or not bool(kept.any()):
        raise ValueError(
            f"a mask of the residual stream needs {decoder.hidden_size} entries, at least one of them kept"
        )
    if bool(kept.all()):
        return
    tied = decoder.head is not None and decoder.head.weight is decoder.embed.weight
    cuts = Cuts()
    for layer in decoder.layers:
        for name, parts in layer.by_input.items():
            for part in parts:
                if name in ("attention", "mlp"):
                    cuts.columns(part, kept)
                else:
                    cuts.rows(part, kept)
    cuts.apply()
    for norm in _norms(decoder):
        norm.weight = _slice(norm.weight, kept, 0)
    embed: Any = decoder.embed
    embed.weight = _slice(embed.weight, kept, 1)
    embed.embedding_dim = int(kept.sum())
    if hasattr(embed, "scalar_embed_scale"):
        # Gemma multiplies embeddings by the root of their width, which a model built anew would do as well.
        embed.scalar_embed_scale = embed.embedding_dim**0.5
        embed.embed_scale = torch.full_like(embed.embed_scale, embed.scalar_embed_scale)
    if decoder.head is not None:
        decoder.head.weight = embed.weight if tied else _slice(decoder.head.weight, kept, 1)
        decoder.head.in_features = embed.embedding_dim


def _norms(decoder: Decoder) -> list[nn.Module]:
    """All norms over the residual stream."""
    norms = [decoder.norm]
    for layer in decoder.layers:
        norms += [layer.input_norm, layer.post_norm]
        norms += [norm for norm in (layer.attention_norm, layer.mlp_norm) if norm is not None]
    return norms


def _slice(weight: Any, kept: torch.Tensor, dim: int) -> nn.Parameter:
    """The kept rows or columns as a new parameter."""
    index = kept.nonzero().squeeze(1).to(weight.device)
    return nn.Parameter(weight.detach().index_select(dim, index), requires_grad=weight.requires_grad)
