"""AS-ViT: Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention
(arXiv 2209.13802, IJCAI 2023).

In front of a few blocks, patches leave whose score is below a learned threshold, so how many stay depends on the image.
The score is the attention of [CLS], each head weighted per token by how strongly it responds there; attention yields
both on its way. Thresholds and backbone are trained together, under a FLOPs budget (``_as_vit_training``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.reductions import Keep
from zoo.engines.training import Recipe
from zoo.errors import Refused
from zoo.families.encoder_fine_tuning import EncoderFineTuning, FineTuning
from zoo.families.encoder_tokens import require_blocks
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Encoder
from zoo.training import Setting

LAYERS = (4, 7, 10)
TRAINED = "as_vit"
"""Field of a model's configuration that holds what training found: layers and thresholds."""


@register("as-vit")
class ASViT(EncoderFineTuning):
    """Keeps the patches whose score exceeds the threshold of the stage, and always at least one.

    One image alone keeps what its own scores say, in the order of the sequence. In a batch every image keeps the mean
    count, by descending score, as the release does: then the images of a batch depend on each other.
    """

    recipe: ClassVar[Recipe] = Recipe(
        epochs=30, learning_rate=2e-5, final=0.1, batch=128, weight_decay=1e-6, clip=None
    )

    layers: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        min_length=1,
        description="Blocks in front of which patches leave, counted from 0; by default those that the model was "
        "trained with, else 4, 7 and 10.",
    )
    thresholds: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None,
        description="Lowest score that stays, for each of the layers (the mean score is about 1 / patches); by default "
        "those that the model was trained with, else 0.2, 0.4, 0.6 ... / patches, where training begins.",
    )
    flops_ratio: float = Field(
        0.65, gt=0, le=1, description="FLOPs that training aims at, as a fraction of the dense encoder's."
    )

    @model_validator(mode="after")
    def _layers_fit(self) -> ASViT:
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must ascend, each block once")
        if self.layers and self.thresholds and len(self.thresholds) != len(self.layers):
            raise ValueError(f"thresholds needs one number for each of the {len(self.layers)} layers")
        return self

    def check(self, loaded: LoadedModel) -> None:
        """Refuse encoders without [CLS], or without one of the blocks."""
        super().check(loaded)
        encoder = loaded.anatomy.encoder
        assert encoder is not None
        if not encoder.has_cls:
            raise refuse(self, "an encoder with a [CLS] token", "none")
        layers = self.blocks(encoder)
        require_blocks(self, loaded, layers)
        if self.thresholds is not None and len(self.thresholds) != len(layers):
            raise Refused(
                f"{self.slug} was given {len(self.thresholds)} thresholds for its layers {', '.join(map(str, layers))}"
            )

    def blocks(self, encoder: Encoder) -> tuple[int, ...]:
        """The blocks in front of which patches leave."""
        trained = getattr(encoder.config, TRAINED, None)
        return self.layers or (tuple(trained["layers"]) if trained else LAYERS)

    def threshold(self, encoder: Encoder, number: int, patches: int) -> float:
        """Threshold of the stage ``number`` (from 0), on images of ``patches`` patches."""
        if self.thresholds is not None:
            return self.thresholds[number]
        trained = getattr(encoder.config, TRAINED, None)
        if trained and tuple(trained["layers"]) == self.blocks(encoder):
            return float(trained["thresholds"][number])
        return initial_threshold(number, patches)

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """In front of the blocks."""
        return [
            BlockStage(
                block, partial(self.drop, threshold=partial(self.threshold, encoder, number)), place="before"
            )
            for number, block in enumerate(self.blocks(encoder))
        ]

    def drop(self, view: BlockView, threshold: Callable[[int], float]) -> Keep | None:
        """Patches above the threshold, by the score of the block before this one."""
        score: torch.Tensor = view.memory["score"]
        kept = above(score, threshold(view.memory["patches"]))
        return None if kept.shape[1] == score.shape[1] else Keep(view.behind_prefix(kept))

    def attend(self, view: BlockView) -> torch.Tensor:
        """The fused kernel; the scores come from its output and the row of [CLS]."""
        seen = view.seen
        mask = seen.mask[:, None, None] if seen.mask is not None and seen.mask.dim() == 2 else seen.mask
        output = functional.scaled_dot_product_attention(
            seen.query, seen.key, seen.value, attn_mask=mask, scale=seen.scaling
        )
        view.memory.setdefault("patches", view.tokens.shape[1] - view.prefix)
        view.memory["score"] = token_score(view.attention(slice(0, 1))[:, :, 0], output)[:, view.prefix :]
        return output.transpose(1, 2)

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """Stages with their thresholds."""
        encoder, patches = reducer.encoder, reducer.memory["patches"]
        return {
            f"threshold before block {block}": self.threshold(encoder, number, patches)
            for number, block in enumerate(self.blocks(encoder))
        }

    def fine_tuning(self, student: LoadedModel, setting: Setting, examples: int) -> FineTuning:
        """Thresholds and backbone learn, from the dense model as teacher."""
        from zoo.methods.encoder_tokens._as_vit_training import fine_tuning

        return fine_tuning(self, student)


def token_score(attention: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Attention of [CLS], weighted per token by the share that each head has in the response there.

    Args:
        attention: probabilities that [CLS] gives to all tokens, ``[B, H, N]``.
        output: attention output of each head, before the output projection, ``[B, H, N, d]``.

    Returns:
        ``[B, N]`` in float32: ``sum_h A[h, 0, j] I[h, j]`` with ``I[h, j] = |O[h, j]| / sum_h' |O[h', j]|``.
    """
    response = output.float().norm(dim=-1)
    importance = response / (response.sum(1, keepdim=True) + 1e-8)
    return (attention.float() * importance).sum(1)


def above(score: torch.Tensor, threshold: float) -> torch.Tensor:
    """Indices of the patches that stay, ``[B, K]``, from ``score [B, n]``.

    One image: all above the threshold, ascending. Several: of each the ``K`` best, best first, where ``K`` is the mean
    number above the threshold. At least one.
    """
    passed = score > threshold
    count = max(1, int(passed.sum()) // len(score))
    if len(score) == 1 and bool(passed.any()):
        return passed[0].nonzero().T
    return score.topk(count, dim=1).indices


def initial_threshold(number: int, patches: int) -> float:
    """Where training begins: the paper's 0.001, 0.002, 0.003 for 196 patches, in proportion to the mean score."""
    return 0.001 * (number + 1) * 196 / patches
