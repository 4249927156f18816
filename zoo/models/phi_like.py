"""Phi-3 decoders: query, key and value are rows of one linear layer, gate and up projection of another."""

from __future__ import annotations

from typing import Any

from zoo.models.anatomy import Anatomy, Attention, LinearPart, Mlp, architecture
from zoo.models.llama_like import attention_parts, decoder_parts, mlp_parts


@architecture("phi3", "zoo_phi3")
def phi_like(model: Any) -> Anatomy:
    """Anatomy of a ``Phi3ForCausalLM`` (or of its inner model, without a head)."""
    inner = getattr(model, "model", model)
    decoder = decoder_parts(inner, getattr(model, "lm_head", None), _attention, _mlp)
    return Anatomy("decoder", model.config.model_type, decoder=decoder)


def _attention(module: Any) -> Attention:
    if not hasattr(module, "qkv_proj"):  # removed
        return attention_parts(module)
    query = module.o_proj.in_features
    key = module.num_key_value_heads * module.head_dim
    return Attention(
        module=module,
        query=LinearPart(module, "qkv_proj", (0, query)),
        key=LinearPart(module, "qkv_proj", (query, query + key)),
        value=LinearPart(module, "qkv_proj", (query + key, query + 2 * key)),
        output=LinearPart(module, "o_proj"),
        head_dim=module.head_dim,
        scaling=module.scaling,
    )


def _mlp(module: Any) -> Mlp:
    if not hasattr(module, "gate_up_proj"):  # removed
        return mlp_parts(module)
    width = module.down_proj.in_features
    return Mlp(
        module=module,
        gate=LinearPart(module, "gate_up_proj", (0, width)),
        up=LinearPart(module, "gate_up_proj", (width, 2 * width)),
        down=LinearPart(module, "down_proj"),
    )
