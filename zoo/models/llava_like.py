"""LLaVA-like vision-language models: encoder, projector, decoder; visual tokens replace placeholder ids."""

from __future__ import annotations

from typing import Any

from zoo.models.anatomy import Anatomy, architecture
from zoo.models.llama_like import decoder_parts
from zoo.models.vit_like import encoder_parts


@architecture("llava")
def llava_like(model: Any) -> Anatomy:
    """Anatomy of ``LlavaForConditionalGeneration``."""
    inner = model.model
    config = model.config
    return Anatomy(
        kind="vlm",
        model_type=config.model_type,
        decoder=decoder_parts(inner.language_model, model.lm_head),
        encoder=encoder_parts(inner.vision_tower),
        projector=inner.multi_modal_projector,
        vlm=inner,
        image_token_id=config.image_token_id,
        feature_layer=config.vision_feature_layer,
        drops_cls=config.vision_feature_select_strategy == "default",
    )
