"""Family base of visual-token methods that already shorten the sequence inside the vision encoder.

The encoder runs short up to the layer whose output is projected. There the survivors go back to their places, because
the model counts its placeholders, and in front of the LLM the tokens of the others leave.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.engines.blocks import BlockReducer, BlockStage
from zoo.engines.crops import feature_layer
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import Refused
from zoo.families.visual_tokens import AppliedTokens, VisualTokenReducer, keep
from zoo.interface import refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy
from zoo.report import Bar, Report


class InEncoderReducer(VisualTokenReducer):
    """A method that declares stages in the encoder, and perhaps more in the decoder."""

    @abstractmethod
    def encoder_stages(self, anatomy: Anatomy) -> list[BlockStage]:
        """Where patches leave; none = the model stays as it is. For the usual ``first_stage``
        all must keep tokens, not merge them.
        """

    def first_stage(self, anatomy: Anatomy, blocks: BlockReducer) -> Stage:
        """The stage in front of the LLM, where the tokens of the patches that have left go; methods whose encoder
        stages merge tokens override it.
        """
        return Stage(-1, partial(_survivors, blocks))

    def decoder_stages(self, anatomy: Anatomy) -> list[Stage]:
        """Where more tokens leave, behind the first decoder layer."""
        return []

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """None of its own: ``apply`` makes them together with the hooks on the encoder.

        Raises:
            Refused: something is to leave, and a stack asks for the decoder's part alone.
        """
        if not self.encoder_stages(anatomy):
            return []
        raise Refused(f"{self.slug} also shortens the encoder: apply it without other visual-token methods")

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

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedTokens:
        """Hook encoder and decoder of ``loaded`` until ``close``."""
        self.check(loaded)
        anatomy = loaded.anatomy
        assert anatomy.encoder is not None
        stages = self.encoder_stages(anatomy)
        if not stages:
            return super().apply(loaded, **resources)
        restore = feature_layer(anatomy) % len(anatomy.encoder.blocks)
        blocks = BlockReducer(anatomy.encoder, stages, self.slug, restore=restore)
        try:
            after = [self.first_stage(anatomy, blocks), *self.decoder_stages(anatomy)]
            reducer = TokenReducer(anatomy, after, self.positions, self.slug)
        except BaseException:
            blocks.close()
            raise
        return AppliedInEncoder(self, loaded, reducer, blocks)


def _survivors(blocks: BlockReducer, view: View) -> Keep:
    """Tokens of the patches that are left in the encoder, in sequence order; no newline tokens."""
    alive = blocks.sources.sum(1) > 0  # [crops, prefix + patches]
    kept = []
    for image in view.images:
        crops = alive[image.packed.first_crop :][: image.crops, image.prefix :].flatten()
        own = (image.crop >= 0) & crops[image.patches[:, 0].clamp(min=0)].to(image.tokens.device)
        kept.append(image.tokens[own])
    return keep(torch.cat(kept))


class AppliedInEncoder(AppliedTokens):
    """A method at work in encoder and decoder."""

    def __init__(
        self, method: InEncoderReducer, loaded: LoadedModel, reducer: TokenReducer, blocks: BlockReducer
    ) -> None:
        super().__init__(method, loaded, reducer)
        self.blocks = blocks

    @property
    def report(self) -> Report:
        """As of every visual-token method, with the tokens of each encoder block beside them."""
        report = super().report
        bars = [
            Bar(label=str(block), kept=tokens, total=self.blocks.entered)
            for block, tokens in enumerate(self.blocks.tokens[:-1])
        ]
        return report.model_copy(update={"bars": {**report.bars, "encoder tokens per crop": bars}})

    def close(self) -> None:
        """Remove all hooks."""
        super().close()
        self.blocks.close()
