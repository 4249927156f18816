"""Gemma 3 text decoders: norms on both sides of attention and MLP, with weights around zero (``1 + w``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zoo.models.anatomy import Anatomy, DecoderLayer, architecture
from zoo.models.llama_like import decoder_parts


@architecture("gemma3_text", "zoo_gemma3_text")
def gemma_like(model: Any) -> Anatomy:
    """Anatomy of a ``Gemma3ForCausalLM`` (or of its inner model, without a head)."""
    inner = getattr(model, "model", model)
    decoder = decoder_parts(inner, getattr(model, "lm_head", None))
    layers = tuple(_with_its_norms(layer, layer.module) for layer in decoder.layers)
    return Anatomy("decoder", model.config.model_type, decoder=replace(decoder, layers=layers))


def _with_its_norms(layer: DecoderLayer, module: Any) -> DecoderLayer:
    return replace(
        layer,
        post_norm=module.pre_feedforward_layernorm,
        attention_norm=module.post_attention_layernorm,
        mlp_norm=module.post_feedforward_layernorm,
    )
