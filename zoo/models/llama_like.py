"""Llama-like decoders: separate q, k, v, o projections and a gated MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.models.anatomy import Anatomy, Attention, Decoder, DecoderLayer, LinearPart, Mlp, architecture


def decoder_parts(inner: Any, head: nn.Linear | None) -> Decoder:
    """Parts of an inner ``LlamaModel``-shaped module and its LM head."""
    layers = []
    for layer in inner.layers:
        attention = layer.self_attn
        layers.append(
            DecoderLayer(
                module=layer,
                input_norm=layer.input_layernorm,
                attention=Attention(
                    module=attention,
                    query=LinearPart(attention, "q_proj"),
                    key=LinearPart(attention, "k_proj"),
                    value=LinearPart(attention, "v_proj"),
                    output=LinearPart(attention, "o_proj"),
                    head_dim=attention.head_dim,
                    scaling=attention.scaling,
                    query_norm=getattr(attention, "q_norm", None),
                    key_norm=getattr(attention, "k_norm", None),
                ),
                post_norm=layer.post_attention_layernorm,
                mlp=Mlp(
                    module=layer.mlp,
                    gate=LinearPart(layer.mlp, "gate_proj"),
                    up=LinearPart(layer.mlp, "up_proj"),
                    down=LinearPart(layer.mlp, "down_proj"),
                ),
            )
        )
    return Decoder(
        module=inner,
        embed=inner.embed_tokens,
        layers=tuple(layers),
        norm=inner.norm,
        rotary=inner.rotary_emb,
        head=head,
        config=inner.config,
        stack=inner.layers,
    )


@architecture("llama", "mistral", "qwen2", "qwen3", "zoo_llama", "zoo_mistral", "zoo_qwen2", "zoo_qwen3")
def llama_like(model: Any) -> Anatomy:
    """Anatomy of a ``*ForCausalLM`` (or of its inner model, without a head)."""
    inner = getattr(model, "model", model)
    return Anatomy(
        kind="decoder",
        model_type=model.config.model_type,
        decoder=decoder_parts(inner, getattr(model, "lm_head", None)),
    )
