"""Vision encoder and projector of a vision-language model, run on fewer patches.

The encoder runs short up to the layer whose output is projected. Behind it, what is left goes back to its places,
because the model counts its placeholders; but the projector only runs on what is there, once for each token that the
encoder has left. A stage before the LLM then takes away the places of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.crops import feature_layer
from zoo.models.anatomy import Anatomy


class ShortEncoder:
    """Installs encoder stages, and the short way through the projector; ``close`` takes both away.

    Args:
        anatomy: of a vision-language model whose projector takes patches one by one, ``[crops, P, C]``.
        stages: none of them behind the layer that is projected.
        name: who shortens, for messages.
        key_bias, counts, attend: see :class:`zoo.engines.blocks.BlockReducer`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stages: Sequence[BlockStage],
        name: str,
        key_bias: Callable[[BlockView], torch.Tensor | None] | None = None,
        counts: bool = False,
        attend: Callable[[BlockView], torch.Tensor] | None = None,
    ) -> None:
        assert anatomy.encoder is not None
        assert anatomy.projector is not None
        self._prefix = anatomy.encoder.prefix
        self._group: tuple[torch.Tensor, torch.Tensor, torch.Size] | None = None
        """Of the call under way: places of the patches that are there, the row of each, and ``[crops, P]``."""
        self.slots: torch.Tensor | None = None
        """Token of the latest input that each patch is in, ``[crops, P]`` (prefix not counted); -1 = it has left."""
        restore = feature_layer(anatomy) % len(anatomy.encoder.blocks)
        self.blocks = BlockReducer(anatomy.encoder, stages, name, key_bias, counts, restore, attend)
        self._hooks = [
            anatomy.projector.register_forward_pre_hook(self._shorten),
            anatomy.projector.register_forward_hook(self._spread, always_call=True),
        ]

    def close(self) -> None:
        """Undo everything; what was recorded stays readable."""
        for hook in self._hooks:
            hook.remove()
        self.blocks.close()

    def _shorten(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """One row for each token of the encoder: ``[crops, P, C]`` -> ``[1, n, C]``."""
        features: torch.Tensor = args[0]
        sources = self.blocks.sources[:, self._prefix :, self._prefix :]
        self.slots = slots = torch.where(sources.sum(1) > 0, sources.argmax(1), -1).to(features.device)
        there = (slots >= 0).flatten()
        crops = torch.arange(len(slots), device=slots.device).unsqueeze(1)
        names = (slots + crops * slots.shape[1]).flatten()[there]
        _, group = names.unique(return_inverse=True)
        places = there.nonzero().squeeze(-1)
        # Patches that share a token have equal features: the first of them goes through the projector.
        first = places.new_zeros(int(group.max()) + 1)
        first = first.scatter_reduce(0, group, places, "amin", include_self=False)
        self._group = (places, group, slots.shape)
        return (features.flatten(0, 1)[first].unsqueeze(0), *args[1:])

    def _spread(self, module: nn.Module, args: Any, output: Any) -> torch.Tensor | None:
        """Back to the places: ``[1, n, D]`` -> ``[crops, P, D]``, zeros where a patch has left."""
        made, self._group = self._group, None
        if made is None or output is None:
            return None
        places, group, shape = made
        full = output.new_zeros(shape.numel(), output.shape[-1])
        full[places] = output[0, group]
        return full.view(*shape, -1)
