"""EViT: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations
(arXiv 2202.07800, ICLR 2022).

In a few blocks, between attention and MLP, the patches to which [CLS] pays most attention stay and all others are
fused into one extra token, their sum weighted with that attention. The extra token is an ordinary one from then on.
Made for training with the reduction on (no further loss, no further parameters); runs on other models at some loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.classification import Batch
from zoo.engines.reductions import Join, Keep
from zoo.engines.training import Loss, Recipe
from zoo.families.encoder_fine_tuning import EncoderFineTuning, FineTuning, backbone_groups
from zoo.families.encoder_tokens import require_blocks
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Encoder
from zoo.training import Setting


class EViTRecipe(Recipe):
    """Fine-tuning as published. From scratch: ``shrink_start=10``, ``shrink_epochs=100``."""

    epochs: float = 30
    learning_rate: float = 2e-5
    final: float = 0.1
    batch: int = 128
    weight_decay: float = 1e-6
    clip: float | None = None
    shrink_start: int = Field(0, ge=0, description="Epoch from which on tokens leave.")
    shrink_epochs: int = Field(0, ge=0, description="Epochs in which the keep ratio falls to its value.")


@register("evit")
class EViT(EncoderFineTuning):
    """Keeps ``ceil(keep_ratio * n)`` of the ``n`` tokens behind the prefix in each reducing block.

    Encoders without [CLS] rank patches by the attention that they receive on average: a variant, named in the report.
    Distillation token and registers stay (the release lets a distillation token compete with the patches).
    """

    recipe: ClassVar[Recipe] = EViTRecipe()

    keep_ratio: float = Field(
        0.7, gt=0, le=1, description="Fraction of the patches kept at each reducing block."
    )
    layers: tuple[int, ...] = Field((3, 6, 9), min_length=1, description="Reducing blocks, counted from 0.")
    fuse: bool = Field(
        True, description="Fuse the other patches into one extra token instead of dropping them."
    )
    tokens: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Patches kept at each reducing block; replaces keep_ratio."
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse encoders that lack one of the reducing blocks."""
        super().check(loaded)
        require_blocks(self, loaded, self.layers)

    @model_validator(mode="after")
    def _counts_fit(self) -> EViT:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers holds a block twice")
        if self.tokens is not None and len(self.tokens) != len(self.layers):
            raise ValueError(f"tokens needs one number for each of the {len(self.layers)} layers")
        return self

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Between the halves of the reducing blocks."""
        if self.tokens is None and self.keep_ratio == 1:
            return []
        counts: Sequence[int | None] = self.tokens or [None] * len(self.layers)
        scores = self.cls_attention if encoder.has_cls else self.received_attention
        return [
            BlockStage(block, partial(self.reduce, scores=scores, tokens=tokens), observes=True)
            for block, tokens in zip(self.layers, counts, strict=True)
        ]

    def reduce(
        self, view: BlockView, scores: Callable[[BlockView], torch.Tensor], tokens: int | None = None
    ) -> Keep | Join | None:
        """Prefix, kept patches by descending score and, when fusing, the extra token."""
        patches = view.tokens.shape[1] - view.prefix
        count = min(patches, math.ceil(self.keep_ratio * patches) if tokens is None else tokens)
        if count == patches:
            return None
        score = scores(view)
        order = score.argsort(1, descending=True)
        dropped = order[:, count:].sort(1).values
        head = torch.arange(view.prefix, device=order.device).expand(len(order), -1)
        kept = torch.cat((head, order[:, :count] + view.prefix), dim=1)
        if not self.fuse:
            return Keep(kept)
        fused = dropped + view.prefix
        weight = torch.ones(view.tokens.shape[:2], device=score.device)
        weight = weight.scatter(1, fused, score.gather(1, dropped))
        # The extra token takes the place of the first patch that goes into it; the others join that one.
        target = fused.new_full(fused[:, 1:].shape, kept.shape[1])
        anchor = torch.cat((kept, fused[:, :1]), dim=1)
        return Join(anchor, fused[:, 1:], target, view.tokens.shape[1], weight, normalise=False)

    @staticmethod
    def cls_attention(view: BlockView) -> torch.Tensor:
        """Attention of [CLS] to each patch, averaged over heads: ``[B, n]``."""
        return view.attention(slice(0, 1))[:, :, 0, view.prefix :].mean(1)

    @staticmethod
    def received_attention(view: BlockView) -> torch.Tensor:
        """Attention that each patch receives, averaged over heads and queries: ``[B, n]``; quadratic in ``n``."""
        return view.received()[:, view.prefix :]

    def fine_tuning(self, student: LoadedModel, setting: Setting, examples: int) -> FineTuning:
        """Everything learns with the reduction on, by the loss of the classes alone."""

        def loss(batch: Batch, step: int) -> Loss:
            with self._at(step, setting.recipe, examples).apply(student):
                logits = student.model(pixel_values=batch.pixels).logits
            return Loss(functional.cross_entropy(logits, batch.labels, reduction="sum"), len(batch.labels))

        return FineTuning(backbone_groups(student.model), loss, lambda: self)

    def _at(self, step: int, recipe: Recipe | None, examples: int) -> EViT:
        """The method with the keep ratio of a step."""
        if not isinstance(recipe, EViTRecipe) or self.tokens is not None:
            return self
        rounds = max(1, examples // (recipe.batch * recipe.accumulate))
        start = recipe.shrink_start
        ratio = keep_rate_at(
            step, step // rounds, self.keep_ratio, start, start + recipe.shrink_epochs, rounds
        )
        return self.model_copy(update={"keep_ratio": ratio})

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """The signal that was used, and the keep ratio of the paper."""
        cls = reducer.encoder.has_cls
        return {
            "ranked by": "[CLS] attention"
            if cls
            else "mean attention received (variant: this encoder has no [CLS])",
            "reducing blocks": _listed(self.layers),
        }


def keep_rate_at(
    iteration: int, epoch: int, base: float, start_epoch: int, end_epoch: int, iterations_per_epoch: int
) -> float:
    """Keep ratio at one step of training from scratch: 1, then a cosine down to ``base``, then ``base``.

    Args:
        iteration: steps since the beginning of the training.
        epoch: epochs since then.
        base: ratio at the end, in ``(0, 1]``.
        start_epoch: epoch at which the ratio begins to fall.
        end_epoch: epoch from which on it is ``base``.
        iterations_per_epoch: steps of one epoch.
    """
    if epoch < start_epoch:
        return 1.0
    if epoch >= end_epoch:
        return base
    begin, end = start_epoch * iterations_per_epoch, end_epoch * iterations_per_epoch
    passed = (iteration - begin) / (end - begin)
    return base + (1 - base) * (math.cos(math.pi * passed) + 1) / 2


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
