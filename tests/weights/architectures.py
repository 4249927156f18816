"""Tiny random models of every decoder architecture that weight methods work on: biases, windows, tied embeddings."""

from __future__ import annotations

from typing import Any

import torch
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
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zoo.engines.statistics import stream
from zoo.engines.surgery import LayerCut, channels_of, share_parameters
from zoo.families.weights import WeightPruner
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_attention_heads": 6, "num_key_value_heads": 6}),
    "llama-gqa": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "llama-bias": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_attention_heads": 6, "num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6},
    ),
    "mistral-window": (
        MistralConfig,
        MistralForCausalLM,
        {"num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 5},
    ),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {"num_attention_heads": 6, "num_key_value_heads": 3, "bos_token_id": 1, "eos_token_id": 2},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    config_class, model_class, options = MODELS[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**SIZES, **options)).eval()
    for (
        parameter_name,
        parameter,
    ) in model.named_parameters():  # biases and norms start at 0 and 1: make them count
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.0 if parameter_name.endswith("bias") else 1.0, std=0.2)
        else:
            nn.init.normal_(parameter, std=0.15)
    for parameter in model.parameters():  # as transformers loads: buffers (rotary frequencies) stay float32
        parameter.data = parameter.data.to(dtype)
    return LoadedModel(model)


def ids(rows: int = 6, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str = "left") -> dict[str, torch.Tensor]:
    batch, mask = ids(3, 12, seed=2), torch.ones(3, 12, dtype=torch.long)
    for row, missing in enumerate((0, 4, 7)):
        columns = slice(0, missing) if side == "left" else slice(12 - missing, 12)
        batch[row, columns], mask[row, columns] = 0, 0
    return {"input_ids": batch, "attention_mask": mask}


def decoder_of(loaded: LoadedModel) -> Decoder:
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    return decoder


@torch.no_grad()
def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits at valid positions, ``[tokens, vocab]``."""
    out = model(**inputs).logits
    mask = inputs.get("attention_mask")
    return out.reshape(-1, out.shape[-1]) if mask is None else out[mask.bool()]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def masked(loaded: LoadedModel, cuts: list[LayerCut]) -> Any:
    """The dense model at full width with removed inputs of o and down projections zeroed, and the biases added."""
    model = share_parameters(loaded.model)
    for layer, cut in zip(decoder_of(LoadedModel(model)).layers, cuts, strict=True):
        head_dim = layer.attention.head_dim
        for part, kept, constant in (
            (
                layer.attention.output,
                None if cut.heads is None else channels_of(cut.heads, head_dim),
                cut.output_bias,
            ),
            (layer.mlp.down, cut.channels, cut.down_bias),
        ):
            if kept is None:
                continue
            old = part.linear
            new = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
            new.weight.data = old.weight.detach() * kept
            new.bias.data.zero_() if old.bias is None else new.bias.data.copy_(old.bias)
            if constant is not None:
                new.bias.data += constant.to(new.bias.dtype)
            setattr(part.owner, part.name, new)
    return model


def decided(method: WeightPruner, loaded: LoadedModel, windows: torch.Tensor) -> list[LayerCut]:
    decoder = decoder_of(loaded)
    return method.decide(decoder, stream(decoder, windows, method.observe))
