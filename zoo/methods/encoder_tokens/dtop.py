"""DToP: Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation (arXiv 2308.01045, ICCV 2023).

Heads in the middle of a segmenter predict the class of every token. Tokens that they are sure of are finalised and
leave, except the surest few of each class, which stay as context. The mask logits of all exits make up one canvas, so
the map is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.reductions import Keep
from zoo.engines.training import Recipe
from zoo.families.encoder_tokens import EncoderTokenReducer
from zoo.interface import refuse, register
from zoo.labelled_pictures import masked_pictures
from zoo.methods.encoder_tokens._dtop_canvas import AppliedSegmentation, paint
from zoo.models import LoadedModel
from zoo.models.anatomy import Encoder
from zoo.models.segvit import MaskPrediction
from zoo.training import Lesson, Setting, Trainable


@register("dtop")
class DToP(EncoderTokenReducer, Trainable):
    """Runs on a SegViT (``zoo.models.segvit``), which ``zoo train dtop`` makes of a plain encoder.

    Images of a batch keep different numbers of tokens; the sequence is as long as the longest of them.
    """

    recipe: ClassVar[Recipe] = Recipe(
        steps=40_000,
        learning_rate=2e-5,
        batch=16,
        warmup=1500 / 40_000,
        schedule="linear",
        power=0.9,
        weight_decay=0.01,
        clip=35,
    )
    data: ClassVar[str] = "cifar10"

    threshold: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Tokens with a higher score are finalised; 1 = none (0.9 for ViT-B, 0.95 for ViT-L).",
    )
    protect: int = Field(5, ge=1, description="Surest tokens of each class that stay at each exit.")
    exit_blocks: tuple[int, ...] | None = Field(
        None,
        min_length=2,
        description="Blocks behind which training puts heads when it makes a segmenter of an encoder, the last one "
        "included; by default at half, two thirds and the end (5, 7, 11 of 12).",
    )

    @model_validator(mode="after")
    def _is_whole(self) -> DToP:
        if self.restore:
            raise ValueError("the map of dtop has its full size without restore")
        return self

    def check(self, loaded: LoadedModel) -> None:
        """Refuse everything but segmenters with heads in the middle."""
        super().check(loaded)
        if loaded.anatomy.model_type != "segvit":
            raise refuse(
                self, "a SegViT (zoo train dtop makes one of a plain encoder)", loaded.anatomy.description
            )

    def check_training(self, loaded: LoadedModel) -> None:
        """Refuse what is no encoder on its own."""
        super().check(loaded)
        if loaded.anatomy.kind != "encoder":
            raise refuse(self, "a vision encoder on its own to train", loaded.anatomy.description)

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Behind the blocks at which tokens may leave."""
        return [] if self.threshold == 1 else self.exits(encoder)

    def exits(self, encoder: Encoder) -> list[BlockStage]:
        """Behind all blocks that have a head, the last one apart."""
        model: Any = encoder.module
        return [
            BlockStage(block, partial(self.leave, head=head), place="after")
            for block, head in zip(model.config.exits[:-1], model.heads[:-1], strict=True)
        ]

    def leave(self, view: BlockView, head: nn.Module) -> Keep | None:
        """Paint what the head says about the tokens that are left; those that it is sure of go."""
        prediction: MaskPrediction = head(view.tokens, view.valid)
        paint(view.memory, prediction, view.valid)
        done = finalised(prediction.scores, view.valid, self.threshold, self.protect)
        if not bool(done.any()):
            return None
        staying = ~done if view.valid is None else ~done & view.valid
        counts = staying.sum(1)
        index = staying.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        valid = torch.arange(index.shape[1], device=index.device) < counts.unsqueeze(1)
        view.memory["places"] = view.memory["places"].gather(1, index)
        view.memory["valid"] = valid
        return Keep(index, None if bool(valid.all()) else valid)

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedSegmentation:
        """Hook ``loaded``; every picture that follows is segmented with fewer tokens until ``close``."""
        self.check(loaded)
        encoder = loaded.anatomy.encoder
        assert encoder is not None
        return AppliedSegmentation(self, loaded, self.stages(encoder))

    def learning(self, loaded: LoadedModel) -> AppliedSegmentation:
        """As ``apply``, but all heads speak, also when no token may leave."""
        encoder = loaded.anatomy.encoder
        assert encoder is not None
        return AppliedSegmentation(self, loaded, self.exits(encoder))

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """Tokens that are still on their way at the end."""
        valid = reducer.memory.get("valid")
        left = reducer.left if valid is None else float(valid.sum(1).float().mean())
        return {"tokens not finalised before the end (mean over images)": left}

    @classmethod
    def read(cls, ref: str | Path) -> Sequence[Any]:
        """Pictures with masks, see ``zoo.labelled_pictures``."""
        return masked_pictures(ref)

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Make a segmenter of the model unless it is one; everything learns while tokens leave."""
        from zoo.methods.encoder_tokens._dtop_training import lesson

        return lesson(self, loaded, examples, heldout, setting)


@torch.no_grad()
def finalised(
    scores: torch.Tensor, valid: torch.Tensor | None, threshold: float, protect: int
) -> torch.Tensor:
    """Tokens whose best score exceeds the threshold, without the ``protect`` best of each class.

    Args:
        scores: ``[B, K, N]``, as ``MaskPrediction.scores``.
        valid: ``[B, N]``, ``False`` for padding, which is never finalised.
        threshold: confidence ``p0``.
        protect: tokens of each class that stay.

    Returns:
        ``[B, N]`` bool.
    """
    best, label = scores.max(1)
    sure = best > threshold
    if valid is not None:
        sure = sure & valid
    classes = torch.arange(scores.shape[1], device=scores.device)[:, None]
    rivals = best.unsqueeze(1) * (sure.unsqueeze(1) & (label.unsqueeze(1) == classes))
    surest = rivals.topk(min(protect, rivals.shape[-1]), dim=-1)
    protected = torch.zeros_like(rivals, dtype=torch.bool).scatter(2, surest.indices, surest.values > 0)
    return sure & ~protected.any(1)
