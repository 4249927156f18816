"""Decoders that plain transformers configurations cannot describe: what structured pruning leaves behind.

Each class is its transformers parent, built from ``config.per_layer_config``. Layer ``i`` has its own
``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size`` (0: no attention, no feed-forward block) and,
where pruning replaced what it removed by a constant, a bias on its output projection (``attention_output_bias``) or
down projection (``mlp_down_bias``). ``head_dim`` is that of the dense model.

With ``original_hidden_size`` the residual stream was rotated and sliced (SliceGPT): it has ``hidden_size`` channels, up
to the last layer, which gives ``output_size``; a matrix on each shortcut leads from one rotation to the next.

With ``wrapper_block`` every linear layer is a sparse matrix between two block-diagonal ones (ARMOR).

Only modules differ: the parent's forward pass, cache and ``generate`` are used as they are. This file needs nothing but
transformers and torch. A copy travels with every saved model, so that where the efficiency zoo is not installed,
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# --- parts of a layer -------------------------------------------------------------------------------------------


def resize(owner: nn.Module, name: str, inputs: int, outputs: int, more_bias: bool = False) -> None:
    """Make ``owner.name`` a linear layer from ``inputs`` to ``outputs``; ``more_bias`` adds a bias if it has none."""
    old: Any = getattr(owner, name)
    bias = more_bias or old.bias is not None
    if (old.in_features, old.out_features, old.bias is not None) != (inputs, outputs, bias):
        weight = old.weight
        setattr(owner, name, nn.Linear(inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype))


class LayerConfig:
    """The configuration of a model as one of its layers sees it: some values are its own."""

    def __init__(self, config: Any, **own: Any) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self._config, name)


def set_heads(attention: Any, heads: int, kv_heads: int, config: Any) -> None:
    """Tell an attention module how many heads its projections have; most see all but the ratio from the shapes."""
    attention.num_key_value_groups = heads // kv_heads
    if hasattr(attention, "qkv_proj"):
        attention.num_key_value_heads = kv_heads
        attention.config = LayerConfig(config, num_attention_heads=heads, num_key_value_heads=kv_heads)


def _inputs(module: nn.Module) -> int:
    """Input channels of the first linear layer that reads the residual stream."""
    names = ("q_proj", "qkv_proj", "up_proj", "gate_up_proj")
    return next(getattr(module, name).in_features for name in names if hasattr(module, name))


def _empty(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with a weight of no elements, which has nothing to initialise."""
    linear = nn.Linear(1, 1, bias=False)
    linear.in_features, linear.out_features = inputs, outputs
    linear.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
    return linear


# Not called attention: by that word transformers tells whether a file brings an attention of its own.
class NoHeads(nn.Module):
    """Stands where attention was removed: adds nothing to the residual stream and writes nothing to the KV cache.

    To code that asks for its projections it is an attention without heads.
    """

    q_norm = k_norm = None

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.layer_idx = old.head_dim, old.scaling, old.layer_idx
        self.hidden_size = _inputs(old)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Zeros of the shape of ``hidden_states``."""
        return torch.zeros_like(hidden_states), None

    @property
    def q_proj(self) -> nn.Linear:
        """A projection to no channels."""
        return _empty(self.hidden_size, 0)

    k_proj = v_proj = q_proj

    @property
    def o_proj(self) -> nn.Linear:
        """A projection from no channels."""
        return _empty(0, self.hidden_size)


class NoChannels(nn.Module):
    """Stands where the feed-forward block was removed: adds nothing to the residual stream."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.hidden_size = _inputs(old)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros ``[batch, tokens, 1]``: the shortcut may have another width than ``hidden_states``."""
        return torch.zeros_like(hidden_states[..., :1])

    @property
    def up_proj(self) -> nn.Linear:
        """A projection to no channels."""
        return _empty(self.hidden_size, 0)

    gate_proj = up_proj

    @property
    def down_proj(self) -> nn.Linear:
        """A projection from no channels."""
        return _empty(0, self.hidden_size)


def remove_attention(layer: Any) -> None:
    """Take the attention of a decoder layer away, and the norms around it."""
    layer.self_attn = NoHeads(layer.self_attn)
    layer.input_layernorm = nn.Identity()
    if hasattr(layer, "pre_feedforward_layernorm"):  # there, the post-attention norm is behind the attention
        layer.post_attention_layernorm = nn.Identity()


def remove_mlp(layer: Any) -> None:
    """Take the feed-forward block of a decoder layer away, and the norms around it."""
    layer.mlp = NoChannels(layer.mlp)
    if hasattr(layer, "pre_feedforward_layernorm"):
        layer.pre_feedforward_layernorm = layer.post_feedforward_layernorm = nn.Identity()
    else:
        layer.post_attention_layernorm = nn.Identity()


def mark_layers_without_cache(layers: Iterable[Any], config: Any) -> None:
    """Tell transformers' caches, which are made from the configuration, which layers store nothing.

    They know layers that read the keys and values of another one; a layer without attention is the same to them.
    """
    absent = [isinstance(layer.self_attn, NoHeads) for layer in layers]
    config.kv_sharing_modes = ["reuse" if one else None for one in absent] if any(absent) else None


def fit_layer(layer: Any, widths: Any, config: Any) -> None:
    """Give one decoder layer, built at full width, the ``widths`` in its own configuration."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden, heads, kv_heads = _inputs(attention), widths.num_attention_heads, widths.num_key_value_heads
    channels = widths.intermediate_size
    if heads:
        query, key = heads * attention.head_dim, kv_heads * attention.head_dim
        rows = {"q_proj": query, "k_proj": key, "v_proj": key, "qkv_proj": query + 2 * key}
        for name in (name for name in rows if hasattr(attention, name)):
            resize(attention, name, hidden, rows[name])
        resize(attention, "o_proj", query, hidden, widths.attention_output_bias)
        set_heads(attention, heads, kv_heads, config)
    else:
        remove_attention(layer)
    if channels:
        rows = {"gate_proj": channels, "up_proj": channels, "gate_up_proj": 2 * channels}
        for name in (name for name in rows if hasattr(mlp, name)):
            resize(mlp, name, hidden, rows[name])
        resize(mlp, "down_proj", channels, hidden, widths.mlp_down_bias)
        mlp.intermediate_size = channels
    else:
        remove_mlp(layer)


# --- wrapped linear layers --------------------------------------------------------------------------------------


class BlockWrapped(nn.Linear):
    """``y = A S B x + bias``: ``weight`` is the sparse core ``S [out, in]``.

    ``left [out/b, b, b]`` and ``right [in/b, b, b]`` are the diagonal blocks of ``A`` and ``B``.
    """

    def __init__(self, inputs: int, outputs: int, block: int, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        identity = torch.eye(block, device=self.weight.device, dtype=self.weight.dtype)
        self.left = nn.Parameter(identity.repeat(outputs // block, 1, 1))
        self.right = nn.Parameter(identity.repeat(inputs // block, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From ``[..., in]`` to ``[..., out]``."""
        y = nn.functional.linear(_by_blocks(self.right, x), self.weight)
        y = _by_blocks(self.left, y)
        return y if self.bias is None else y + self.bias


def _by_blocks(blocks: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The block-diagonal matrix of ``blocks [n, b, b]`` times ``x [..., n * b]``."""
    return torch.einsum("nij,...nj->...ni", blocks, x.unflatten(-1, (len(blocks), -1))).flatten(-2)


def wrap_linears(layer: nn.Module, block: int) -> None:
    """Put wrapped linear layers of the same shapes in the place of all those of a decoder layer."""
    for owner in list(layer.modules()):
        for name, old in list(owner.named_children()):
            if type(old) is nn.Linear:
                options = {
                    "bias": old.bias is not None,
                    "device": old.weight.device,
                    "dtype": old.weight.dtype,
                }
                setattr(owner, name, BlockWrapped(old.in_features, old.out_features, block, **options))


# --- a sliced residual stream -----------------------------------------------------------------------------------


class Shortcuts:
    """Forward pass of a pre-norm layer whose two shortcuts are matrices."""

    def forward(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """From ``[batch, tokens, hidden_size]`` to the width that the next layer reads."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


@cache
def _with_shortcuts(layer_class: type[nn.Module]) -> type[nn.Module]:
    # A subclass, so that transformers still knows it as a decoder layer (gradient checkpointing, hidden states).
    return type(f"Sliced{layer_class.__name__}", (Shortcuts, layer_class), {})


def add_shortcuts(layer: Any, attention: nn.Linear, mlp: nn.Linear) -> None:
    """Give a layer two matrices: ``h = attention(x) + self_attn(norm(x))``, then ``mlp(h) + mlp_block(norm(h))``."""
    layer.attention_shortcut, layer.mlp_shortcut = attention, mlp
    layer_class: Any = type(layer)
    layer.__class__ = _with_shortcuts(layer_class)


def divide_by(norm: Any, width: int) -> None:
    """Let an RMS norm over fewer channels divide by the root of ``sum(x^2) / width + eps``.

    ``x rsqrt(sum(x^2) / D + e) = sqrt(D / d) x rsqrt(sum(x^2) / d + e D / d)``: the factor belongs to the norm's
    weight, which is saved with it; the epsilon is set here.
    """
    norm.variance_epsilon *= width / norm.weight.numel()


def slice_residual(model: Any, config: Any) -> None:
    """Give a model, built at ``hidden_size``, its shortcuts, the epsilons of its norms, and the width of its output."""
    inner, layers = model.model, model.model.layers
    weight, hidden, output = inner.embed_tokens.weight, config.hidden_size, config.output_size
    kind = {"device": weight.device, "dtype": weight.dtype}
    for layer in layers:
        out = output if layer is layers[-1] else hidden
        shortcuts = (nn.Linear(hidden, size, bias=False, **kind) for size in (hidden, out))
        add_shortcuts(layer, *shortcuts)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            if not isinstance(norm, nn.Identity):
                divide_by(norm, config.original_hidden_size)
        if not isinstance(layer.mlp, NoChannels):
            resize(layer.mlp, "down_proj", layer.mlp.down_proj.in_features, out)
    inner.norm.weight = nn.Parameter(torch.ones(output, **kind))
    divide_by(inner.norm, config.original_hidden_size)
    resize(model, "lm_head", output, model.lm_head.out_features)


# --- configurations and models ----------------------------------------------------------------------------------


class PerLayerWidths(PreTrainedConfig):
    """Configuration side. Parents ask that heads divide the hidden size; here each layer is checked instead."""

    attention_output_bias: bool = False
    mlp_down_bias: bool = False
    original_hidden_size: int | None = None
    output_size: int | None = None
    wrapper_block: int | None = None
    kv_sharing_modes: list[str | None] | None = None

    def validate_architecture(self) -> None:
        """Raise ``ValueError`` when a layer cannot be built."""
        for index in range(self.num_hidden_layers):
            widths = self.per_layer_config[index]
            heads, groups = widths.num_attention_heads, widths.num_key_value_heads
            whole = heads == groups == 0 or (groups > 0 and heads > 0 and heads % groups == 0)
            if not whole or widths.intermediate_size < 0:
                raise ValueError(
                    f"layer {index} has {heads} heads, {groups} key-value heads and {widths.intermediate_size} "
                    "channels; it needs the same number of heads for every key-value head, or none of either"
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
        config._attn_implementation = full._attn_implementation
        for module in model.modules():
            if getattr(module, "config", None) is full:
                module.config = config
        for index, layer in enumerate(model.model.layers):
            fit_layer(layer, config.per_layer_config[index], config)
            if config.wrapper_block is not None:
                wrap_linears(layer, config.wrapper_block)
        mark_layers_without_cache(model.model.layers, config)
        if config.original_hidden_size is not None:
            slice_residual(model, config)


@strict
class PrunedLlamaConfig(PerLayerWidths, LlamaConfig):
    """Llama with widths per layer."""

    model_type = "zoo_llama"


class PrunedLlamaForCausalLM(BuiltPerLayer, LlamaForCausalLM):
    """Llama with widths per layer."""

    config_class = PrunedLlamaConfig


@strict
class PrunedMistralConfig(PerLayerWidths, MistralConfig):
    """Mistral with widths per layer."""

    model_type = "zoo_mistral"


class PrunedMistralForCausalLM(BuiltPerLayer, MistralForCausalLM):
    """Mistral with widths per layer."""

    config_class = PrunedMistralConfig


@strict
class PrunedQwen2Config(PerLayerWidths, Qwen2Config):
    """Qwen2 and Qwen2.5 with widths per layer."""

    model_type = "zoo_qwen2"


class PrunedQwen2ForCausalLM(BuiltPerLayer, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with widths per layer."""

    config_class = PrunedQwen2Config


@strict
class PrunedQwen3Config(PerLayerWidths, Qwen3Config):
    """Qwen3 with widths per layer."""

    model_type = "zoo_qwen3"


class PrunedQwen3ForCausalLM(BuiltPerLayer, Qwen3ForCausalLM):
    """Qwen3 with widths per layer."""

    config_class = PrunedQwen3Config


@strict
class PrunedGemma3TextConfig(PerLayerWidths, Gemma3TextConfig):
    """Gemma 3 (text) with widths per layer."""

    model_type = "zoo_gemma3_text"


class PrunedGemma3ForCausalLM(BuiltPerLayer, Gemma3ForCausalLM):
    """Gemma 3 (text) with widths per layer."""

    config_class = PrunedGemma3TextConfig


@strict
class PrunedPhi3Config(PerLayerWidths, Phi3Config):
    """Phi-3 with widths per layer."""

    model_type = "zoo_phi3"

    def validate_rope(self) -> None:
        """Phi-3's own check reads a number of heads, which layers do not share; rotary embeddings do not change."""
        PreTrainedConfig.validate_rope(self)


class PrunedPhi3ForCausalLM(BuiltPerLayer, Phi3ForCausalLM):
    """Phi-3 with widths per layer."""

    config_class = PrunedPhi3Config
