"""ViT-like encoders: pre-norm blocks, with q, k, v projections apart or (Qwen) fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from zoo.errors import Refused
from zoo.models.anatomy import Anatomy, Attention, Encoder, EncoderBlock, LinearPart, architecture


def _attention(module: nn.Module) -> Attention:
    output = next(
        name for name in ("o_proj", "out_proj", "projection_layer", "proj") if hasattr(module, name)
    )
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    scaling = getattr(module, "scaling", None) or getattr(module, "scale", None) or head_dim**-0.5
    fused = getattr(module, "qkv", None)
    if fused is None:
        query, key, value = (LinearPart(module, name) for name in ("q_proj", "k_proj", "v_proj"))
    else:
        width = fused.out_features // 3
        query, key, value = (
            LinearPart(module, "qkv", (third * width, (third + 1) * width)) for third in range(3)
        )
    return Attention(
        module=module,
        query=query,
        key=key,
        value=value,
        output=LinearPart(module, output),
        head_dim=head_dim,
        scaling=float(scaling),
    )


def _identity(x: Any) -> Any:
    return x


def _scale(module: Any, number: int) -> Callable[[Any], Any]:
    """Layer scale of one branch: a module (DINOv2), a bare factor (InternVL), or none."""
    factor = getattr(module, f"lambda_{number}", None)
    if factor is not None:
        return lambda x: factor * x
    scale: Callable[[Any], Any] = getattr(module, f"layer_scale{number}", _identity)
    return scale


def _block(module: Any) -> EncoderBlock:
    """Recognise a block by the names its parts have: Qwen-VL, DINOv2, ViT/DeiT/InternVL, CLIP/SigLIP/Idefics."""
    if hasattr(module, "norm1"):
        names = ("norm1", "attn" if hasattr(module, "attn") else "attention", "norm2")
    elif hasattr(module, "layernorm_before"):
        names = ("layernorm_before", "attention", "layernorm_after")
    elif hasattr(module, "layer_norm1"):
        names = ("layer_norm1", "self_attn", "layer_norm2")
    else:
        raise Refused(f"an encoder block of type {type(module).__name__} is not supported yet")
    norm1, attention, norm2 = (getattr(module, name) for name in names)
    return EncoderBlock(
        module=module,
        norm1=norm1,
        attention=_attention(attention),
        scale1=_scale(module, 1),
        norm2=norm2,
        mlp=module.mlp,
        scale2=_scale(module, 2),
        drop=getattr(module, "drop_path", getattr(module, "dropout", None)),
    )


def _blocks_of(module: nn.Module) -> list[Any]:
    """The longest ``ModuleList`` inside is the stack of blocks."""
    lists = [list(child) for child in module.modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise Refused(f"{type(module).__name__} has no stack of blocks")
    return max(lists, key=len)


_WITHOUT_CLS = (
    "siglip",
    "siglip_vision_model",
    "idefics3_vision",
    "smolvlm_vision",
    "qwen2_5_vl_vision",
    "qwen3_vl_vision",
)


def _side(value: int | Sequence[int]) -> int:
    """A size given as one number or as ``(height, width)``."""
    return value if isinstance(value, int) else value[0]


def encoder_parts(module: Any) -> Encoder:
    """Parts of a vision encoder such as ``Dinov2Model`` or ``CLIPVisionModel``."""
    config = module.config
    has_cls = config.model_type not in _WITHOUT_CLS
    distilled = config.model_type == "deit"
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    blocks = tuple(_block(block) for block in _blocks_of(module))
    return Encoder(
        module=module,
        blocks=blocks,
        hidden_size=config.hidden_size,
        heads=blocks[0].attention.heads,
        patch_size=_side(config.patch_size),
        image_size=_side(getattr(config, "image_size", 0)),
        prefix=int(has_cls) + int(distilled) + registers,
        has_cls=has_cls,
        has_distillation_token=distilled,
        config=config,
    )


@architecture("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model")
def vit_like(model: Any) -> Anatomy:
    """Anatomy of a bare encoder or of one with a classification head."""
    return Anatomy(kind="encoder", model_type=model.config.model_type, encoder=encoder_parts(model))
