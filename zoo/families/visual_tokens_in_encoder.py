"""Family base of visual-token methods that already shorten the sequence inside the vision encoder.

The encoder runs short up to the layer whose output is projected, and so does the projector. There the survivors go back
to their places, because the model counts its placeholders, and in front of the LLM the tokens of the others leave.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from zoo.engines.blocks import BlockStage
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, View
from zoo.families.visual_tokens import VisualTokenReducer, keep
from zoo.interface import refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy


class InEncoderReducer(VisualTokenReducer):
    """A method that declares stages in the encoder, and perhaps more in the decoder."""

    @abstractmethod
    def encoder_stages(self, anatomy: Anatomy) -> list[BlockStage]:
        """Where patches leave; none = the model stays as it is. For the usual ``first_stage``
        all must keep tokens, not merge them.
        """

    def first_stage(self, anatomy: Anatomy) -> Stage:
        """The stage in front of the LLM, where the tokens of the patches that have left go; methods whose encoder
        stages merge tokens override it.
        """
        return Stage(-1, survivors)

    def decoder_stages(self, anatomy: Anatomy) -> list[Stage]:
        """Where more tokens leave, behind the first decoder layer."""
        return []

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """What the encoder has removed leaves before the LLM; then those of the decoder."""
        if not self.encoder_stages(anatomy):
            return []
        return [self.first_stage(anatomy), *self.decoder_stages(anatomy)]

    def check(self, loaded: LoadedModel) -> None:
        """Refuse encoders that cannot be shortened, and models whose tokens are made from several patches."""
        super().check(loaded)
        anatomy = loaded.anatomy
        encoder, linear = anatomy.encoder, None
        if anatomy.projector is not None:
            linear = next((part for part in anatomy.projector.modules() if isinstance(part, nn.Linear)), None)
        if (
            encoder is None
            or not encoder.has_cls
            or not anatomy.drops_cls
            or encoder.packed_order is not None
        ):
            raise refuse(self, "a vision encoder with [CLS]", f"none: {anatomy.description}")
        if linear is None or linear.in_features != encoder.hidden_size:
            raise refuse(self, "one visual token per encoder patch", f"merged patches: {anatomy.description}")


def survivors(view: View) -> Keep:
    """Tokens of the patches that are left in the encoder, in sequence order; no newline tokens."""
    kept = []
    for image in view.images:
        there = (view.encoder_slots(image) >= 0).flatten()
        own = (image.crop >= 0) & there[image.patches[:, 0].clamp(min=0)]
        kept.append(image.tokens[own])
    return keep(torch.cat(kept))
