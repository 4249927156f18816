"""Decoders whose layers have widths of their own: what structured pruning leaves behind.

Each class is its transformers parent, built from ``config.per_layer_config``. Layer ``i`` has its own
``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size`` and, where pruning replaced what it removed
by a constant, a bias on its output projection (``attention_output_bias``) or down projection (``mlp_down_bias``).
``head_dim`` and the residual stream keep their width: only linear layers differ, and the parent's forward pass, cache
and ``generate`` are used as they are.

This file needs nothing but transformers and torch. A copy travels with every saved model, so that where the
efficiency zoo is not installed, ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works.
"""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def resize(owner: nn.Module, name: str, inputs: int, outputs: int, more_bias: bool = False) -> None:
    """Make ``owner.name`` a linear layer from ``inputs`` to ``outputs``; ``more_bias`` adds a bias if it has none."""
    old: Any = getattr(owner, name)
    bias = more_bias or old.bias is not None
    if (old.in_features, old.out_features, old.bias is not None) != (inputs, outputs, bias):
        weight = old.weight
        setattr(owner, name, nn.Linear(inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype))


def fit_layer(layer: Any, widths: Any) -> None:
    """Give one decoder layer the widths in its own configuration."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden, channels = attention.q_proj.in_features, widths.intermediate_size
    query = widths.num_attention_heads * attention.head_dim
    key = widths.num_key_value_heads * attention.head_dim
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        resize(attention, name, hidden, rows)
    resize(attention, "o_proj", query, hidden, widths.attention_output_bias)
    attention.num_key_value_groups = widths.num_attention_heads // widths.num_key_value_heads
    for name in ("gate_proj", "up_proj"):
        resize(mlp, name, hidden, channels)
    resize(mlp, "down_proj", channels, hidden, widths.mlp_down_bias)
    mlp.intermediate_size = channels


class PerLayerWidths:
    """Configuration side. Parents ask that heads divide the hidden size; here each layer is checked instead."""

    def validate_architecture(self: Any) -> None:
        """Raise ``ValueError`` when a layer cannot be built."""
        for index in range(self.num_hidden_layers):
            widths = self.per_layer_config[index]
            heads, groups = widths.num_attention_heads, widths.num_key_value_heads
            if min(heads, groups, widths.intermediate_size) < 1 or heads % groups:
                raise ValueError(
                    f"layer {index} has {heads} heads, {groups} key-value heads and {widths.intermediate_size} "
                    "channels; it needs at least one of each, and the same number of heads per key-value head"
                )


class BuiltPerLayer:
    """Model side: build the parent at full width, then fit each layer.

    Under ``from_pretrained`` this costs nothing, because models are built without storage there.
    """

    def __init__(self, config: Any) -> None:
        full = copy.deepcopy(config)
        full.per_layer_config = None
        super().__init__(full)  # type: ignore[call-arg]
        model: Any = self
        for index, layer in enumerate(model.model.layers):
            fit_layer(layer, config.per_layer_config[index])
        config._attn_implementation = full._attn_implementation
        for module in model.modules():
            if getattr(module, "config", None) is full:
                module.config = config


@strict
class PrunedLlamaConfig(PerLayerWidths, LlamaConfig):
    """Llama with widths per layer."""

    model_type = "zoo_llama"
    attention_output_bias: bool = False
    mlp_down_bias: bool = False


class PrunedLlamaForCausalLM(BuiltPerLayer, LlamaForCausalLM):
    """Llama with widths per layer."""

    config_class = PrunedLlamaConfig


@strict
class PrunedMistralConfig(PerLayerWidths, MistralConfig):
    """Mistral with widths per layer."""

    model_type = "zoo_mistral"
    attention_output_bias: bool = False
    mlp_down_bias: bool = False


class PrunedMistralForCausalLM(BuiltPerLayer, MistralForCausalLM):
    """Mistral with widths per layer."""

    config_class = PrunedMistralConfig


@strict
class PrunedQwen2Config(PerLayerWidths, Qwen2Config):
    """Qwen2 and Qwen2.5 with widths per layer."""

    model_type = "zoo_qwen2"
    attention_output_bias: bool = False
    mlp_down_bias: bool = False


class PrunedQwen2ForCausalLM(BuiltPerLayer, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with widths per layer."""

    config_class = PrunedQwen2Config


@strict
class PrunedQwen3Config(PerLayerWidths, Qwen3Config):
    """Qwen3 with widths per layer."""

    model_type = "zoo_qwen3"
    attention_output_bias: bool = False
    mlp_down_bias: bool = False


class PrunedQwen3ForCausalLM(BuiltPerLayer, Qwen3ForCausalLM):
    """Qwen3 with widths per layer."""

    config_class = PrunedQwen3Config
