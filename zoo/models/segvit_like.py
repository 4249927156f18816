"""Where the parts of a SegViT are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zoo.models.anatomy import Anatomy, architecture
from zoo.models.vit_like import encoder_parts


@architecture("segvit")
def segvit_like(model: Any) -> Anatomy:
    """Anatomy of the encoder inside, which runs without its prefix tokens; the whole model is its module."""
    parts = encoder_parts(model.backbone)
    parts = replace(parts, module=model, prefix=0, has_cls=False, has_distillation_token=False)
    return Anatomy(kind="encoder", model_type=model.config.model_type, encoder=parts)
