"""ViT-like encoders: pre-norm blocks with separate q, k, v projections."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.errors import Refused
from zoo.models.anatomy import Anatomy, Attention, Encoder, EncoderBlock, LinearPart, architecture


def _attention(module: nn.Module) -> Attention:
    output = "o_proj" if hasattr(module, "o_proj") else "out_proj"
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    scaling = getattr(module, "scaling", None) or getattr(module, "scale", None) or head_dim**-0.5
    return Attention(
        module=module,
        query=LinearPart(module, "q_proj"),
        key=LinearPart(module, "k_proj"),
        value=LinearPart(module, "v_proj"),
        output=LinearPart(module, output),
        head_dim=head_dim,
        scaling=float(scaling),
    )


def _identity(x: Any) -> Any:
    return x


def _block(module: Any) -> EncoderBlock:
    """Recognise a block by the names its norms have: DINOv2, ViT/DeiT, CLIP/SigLIP."""
    if hasattr(module, "norm1"):
        names = ("norm1", "attention", "norm2")
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
        scale1=getattr(module, "layer_scale1", _identity),
        norm2=norm2,
        mlp=module.mlp,
        scale2=getattr(module, "layer_scale2", _identity),
        drop=getattr(module, "drop_path", getattr(module, "dropout", None)),
    )


def _blocks_of(module: nn.Module) -> list[Any]:
    """The longest ``ModuleList`` inside is the stack of blocks."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise Refused(f"{type(module).__name__} has no stack of blocks")
    return list(max(lists, key=lambda stack: len(stack)))


def encoder_parts(module: Any) -> Encoder:
    """Parts of a vision encoder such as ``Dinov2Model`` or ``CLIPVisionModel``."""
    config = module.config
    has_cls = config.model_type not in ("siglip", "siglip_vision_model")
    distilled = config.model_type == "deit"
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    blocks = tuple(_block(block) for block in _blocks_of(module))
    return Encoder(
        module=module,
        blocks=blocks,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        patch_size=config.patch_size,
        image_size=config.image_size,
        prefix=int(has_cls) + int(distilled) + registers,
        has_cls=has_cls,
        has_distillation_token=distilled,
        config=config,
    )


@architecture(
    "vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model"
)
def vit_like(model: Any) -> Anatomy:
    """Anatomy of a bare encoder or of one with a classification head."""
    return Anatomy(kind="encoder", model_type=model.config.model_type, encoder=encoder_parts(model))
