"""Llama-like decoders: separate q, k, v, o projections and a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.models.anatomy import Anatomy, Attention, Decoder, DecoderLayer, LinearPart, Mlp, architecture


def attention_parts(module: Any) -> Attention:
    """Parts of an attention module with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``."""
    return Attention(
        module=module,
        query=LinearPart(module, "q_proj"),
        key=LinearPart(module, "k_proj"),
        value=LinearPart(module, "v_proj"),
        output=LinearPart(module, "o_proj"),
        head_dim=module.head_dim,
        scaling=module.scaling,
        query_norm=getattr(module, "q_norm", None),
        key_norm=getattr(module, "k_norm", None),
    )


def mlp_parts(module: Any) -> Mlp:
    """Parts of a gated MLP with ``gate_proj``, ``up_proj`` and ``down_proj``."""
    return Mlp(
        module=module,
        gate=LinearPart(module, "gate_proj"),
        up=LinearPart(module, "up_proj"),
        down=LinearPart(module, "down_proj"),
    )


def decoder_parts(
    inner: Any,
    head: nn.Linear | None,
    attention: Callable[[Any], Attention] = attention_parts,
    mlp: Callable[[Any], Mlp] = mlp_parts,
) -> Decoder:
    """Parts of an inner ``LlamaModel``-shaped module and its LM head."""
    layers = tuple(
        DecoderLayer(
            module=layer,
            input_norm=layer.input_layernorm,
            attention=attention(layer.self_attn),
            post_norm=layer.post_attention_layernorm,
            mlp=mlp(layer.mlp),
            attention_shortcut=getattr(layer, "attention_shortcut", None),
            mlp_shortcut=getattr(layer, "mlp_shortcut", None),
        )
        for layer in inner.layers
    )
    return Decoder(
        module=inner,
        embed=inner.embed_tokens,
        layers=layers,
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
