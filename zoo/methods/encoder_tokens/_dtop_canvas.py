"""Where DToP keeps what its heads say: a canvas that each exit paints a part of, until the last head completes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zoo.engines.blocks import BlockReducer, BlockStage
from zoo.families.encoder_tokens import AppliedEncoder, EncoderTokenReducer
from zoo.models import LoadedModel
from zoo.models.segvit import MaskPrediction


class AppliedSegmentation(AppliedEncoder):
    """DToP at work: the last head speaks of the tokens that are left, and completes the canvas."""

    def __init__(
        self, method: EncoderTokenReducer, loaded: LoadedModel, stages: Sequence[BlockStage]
    ) -> None:
        encoder = loaded.anatomy.encoder
        assert encoder is not None
        blocks = BlockReducer(encoder, stages, method.slug)
        super().__init__(method, loaded, blocks)
        self._blocks = blocks
        self._hooks: list[Any] = []
        if stages:
            last = loaded.model.heads[-1]
            self._hooks = [
                last.register_forward_pre_hook(self._point_out_padding, with_kwargs=True),
                last.register_forward_hook(self._complete),
            ]

    @property
    def said(self) -> list[MaskPrediction]:
        """What each head said about the latest input, with the canvas as it was then."""
        exits: list[MaskPrediction] = self._blocks.memory["exits"]
        return exits

    def close(self) -> None:
        """Undo the method; harmless when done twice."""
        super().close()
        while self._hooks:
            self._hooks.pop().remove()

    def _point_out_padding(
        self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return given, {**named, "valid": self._blocks.memory.get("valid")}

    def _complete(self, _: nn.Module, __: tuple[Any, ...], prediction: MaskPrediction) -> MaskPrediction:
        memory = self._blocks.memory
        return paint(memory, prediction, memory.get("valid"))


def paint(memory: dict[str, Any], prediction: MaskPrediction, valid: torch.Tensor | None) -> MaskPrediction:
    """Write mask logits of the tokens that are left onto the canvas.

    Args:
        memory: of one input; ``canvas [B, K, hw]`` and ``places [B, N]`` (where the tokens are) are begun when missing,
            ``exits`` collects what is returned.
        prediction: masks ``[B, K, N]``.
        valid: ``[B, N]``, ``False`` for padding.

    Returns:
        The classes of this head and the whole canvas.
    """
    masks = prediction.masks
    if "canvas" not in memory:
        memory["canvas"] = torch.zeros_like(masks)
        memory["places"] = torch.arange(masks.shape[-1], device=masks.device).expand(len(masks), -1)
    canvas = memory["canvas"]
    beyond = canvas.shape[-1]
    places = memory["places"] if valid is None else memory["places"].masked_fill(~valid, beyond)
    wider = torch.cat((canvas, canvas.new_zeros(*canvas.shape[:2], 1)), -1)  # padding is painted there
    wider = wider.scatter(2, places.unsqueeze(1).expand_as(masks), masks.to(canvas.dtype))
    memory["canvas"] = wider[..., :beyond]
    whole = MaskPrediction(prediction.classes, memory["canvas"])
    memory.setdefault("exits", []).append(whole)
    return whole
