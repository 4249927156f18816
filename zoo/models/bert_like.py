"""BERT: a bidirectional encoder of text, whose norms follow the blocks."""

from __future__ import annotations

from typing import Any

from zoo.models.anatomy import Anatomy, Attention, DecoderLayer, LinearPart, Mlp, TextEncoder, architecture


@architecture("bert")
def bert_like(model: Any) -> Anatomy:
    """Anatomy of a ``BertModel``, or of a model with one inside."""
    inner = getattr(model, "bert", model)
    encoder = TextEncoder(
        module=inner,
        embed=inner.embeddings.word_embeddings,
        layers=tuple(_layer(layer) for layer in inner.encoder.layer),
        norm=inner.encoder.layer[-1].output.LayerNorm,
        rotary=None,
        head=None,
        config=inner.config,
        stack=inner.encoder.layer,
    )
    return Anatomy("embedding", model.config.model_type, text_encoder=encoder)


def _layer(layer: Any) -> DecoderLayer:
    attention = layer.attention.self
    query, key, value = (LinearPart(attention, name) for name in ("query", "key", "value"))
    return DecoderLayer(
        module=layer,
        input_norm=layer.attention.output.LayerNorm,
        attention=Attention(
            module=attention,
            query=query,
            key=key,
            value=value,
            output=LinearPart(layer.attention.output, "dense"),
            head_dim=attention.attention_head_size,
            scaling=attention.attention_head_size**-0.5,
        ),
        post_norm=layer.output.LayerNorm,
        mlp=Mlp(
            module=layer,
            gate=None,
            up=LinearPart(layer.intermediate, "dense"),
            down=LinearPart(layer.output, "dense"),
        ),
    )
