"""Where the parts of a Vim are."""

from __future__ import annotations

from typing import Any

from zoo.models.anatomy import Anatomy, StateSpaceBlock, StateSpaceEncoder, architecture


@architecture("vim")
def vim_like(model: Any) -> Anatomy:
    """Anatomy of a ``VimModel``, or of one with a classification head."""
    inner = getattr(model, "vim", model)
    config = inner.config
    encoder = StateSpaceEncoder(
        module=inner,
        blocks=tuple(
            StateSpaceBlock(layer, layer.mixer.in_proj, layer.mixer.backward_scan, layer.mixer.out_proj)
            for layer in inner.layers
        ),
        hidden_size=config.hidden_size,
        patch_size=config.patch_size,
        image_size=config.image_size,
        has_cls=config.use_cls_token,
        config=config,
    )
    return Anatomy("encoder", config.model_type, state_space=encoder)
