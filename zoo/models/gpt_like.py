"""GPT-2: positions are added to the embeddings, and projections are stored transposed (``Conv1D``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.models.anatomy import Anatomy, Attention, Decoder, DecoderLayer, LinearPart, Mlp, architecture


@dataclass(frozen=True)
class TransposedPart(LinearPart):
    """Some output features of a transformers ``Conv1D``, whose weight is ``[in, out]``; seen as ``[out, in]``."""

    @property
    def weight(self) -> torch.Tensor:
        """Weight of these features, ``[out, in]`` (a view)."""
        weight = self._layer.weight.t()
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    @property
    def bias(self) -> torch.Tensor:
        """Bias of these features, ``[out]``."""
        bias: torch.Tensor = self._layer.bias
        return bias if self.rows is None else bias[self.rows[0] : self.rows[1]]

    @property
    def out_features(self) -> int:
        """Number of these features."""
        return self.weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply them to ``x [..., in]``."""
        return nn.functional.linear(x, self.weight, self.bias)

    @property
    def _layer(self) -> Any:
        return getattr(self.owner, self.name)


@architecture("gpt2")
def gpt_like(model: Any) -> Anatomy:
    """Anatomy of a ``GPT2LMHeadModel`` or a bare ``GPT2Model``."""
    inner = getattr(model, "transformer", model)
    decoder = Decoder(
        module=inner,
        embed=inner.wte,
        layers=tuple(_layer(layer) for layer in inner.h),
        norm=inner.ln_f,
        rotary=None,
        head=getattr(model, "lm_head", None),
        config=inner.config,
        stack=inner.h,
    )
    return Anatomy("decoder", model.config.model_type, decoder=decoder)


def _layer(layer: Any) -> DecoderLayer:
    attention, width = layer.attn, layer.attn.embed_dim
    query, key, value = (
        TransposedPart(attention, "c_attn", (third * width, (third + 1) * width)) for third in range(3)
    )
    return DecoderLayer(
        module=layer,
        input_norm=layer.ln_1,
        attention=Attention(
            module=attention,
            query=query,
            key=key,
            value=value,
            output=TransposedPart(attention, "c_proj"),
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        ),
        post_norm=layer.ln_2,
        mlp=Mlp(
            module=layer.mlp,
            gate=None,
            up=TransposedPart(layer.mlp, "c_fc"),
            down=TransposedPart(layer.mlp, "c_proj"),
        ),
    )
