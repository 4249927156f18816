"""A transformers ViT whose blocks carry the weights of a timm-style block (fused qkv), for golden cases."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTModel

from zoo.models import LoadedModel


def plain_vit(blocks: list[dict[str, torch.Tensor]], heads: int, mlp_ratio: float, eps: float) -> LoadedModel:
    """One ``ViTLayer`` for each weight dictionary; ``run_blocks`` feeds it with tokens."""
    dim = blocks[0]["norm1.weight"].numel()
    config = ViTConfig(
        hidden_size=dim,
        num_hidden_layers=len(blocks),
        num_attention_heads=heads,
        intermediate_size=int(dim * mlp_ratio),
        layer_norm_eps=eps,
        qkv_bias="attn.qkv.bias" in blocks[0],
        hidden_act="gelu",
        image_size=8,
        patch_size=4,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    for layer, weights in zip(model.layers, blocks, strict=True):
        state = {}
        for ours, theirs in {
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "attention.o_proj": "attn.proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items():
            state[f"{ours}.weight"] = weights[f"{theirs}.weight"]
            state[f"{ours}.bias"] = weights[f"{theirs}.bias"]
        for kind in ("weight", "bias"):
            if f"attn.qkv.{kind}" in weights:
                for name, part in zip("qkv", weights[f"attn.qkv.{kind}"].chunk(3), strict=True):
                    state[f"attention.{name}_proj.{kind}"] = part
        layer.load_state_dict(state)
    return LoadedModel(model)


@torch.no_grad()
def run_blocks(loaded: LoadedModel, x: torch.Tensor) -> list[torch.Tensor]:
    """Run the model on tokens ``x [B, N, D]`` instead of an image; returns what each block puts out."""
    handle = loaded.model.embeddings.register_forward_hook(lambda *_: x)
    try:
        out = loaded.model(torch.zeros(len(x), 3, 8, 8), output_hidden_states=True)
    finally:
        handle.remove()
    return list(out.hidden_states[1:])
