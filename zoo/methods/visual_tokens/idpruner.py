"""IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs (arXiv 2602.13315).

Before the LLM, greedy picks by maximal marginal relevance: the next token is the one with the best trade-off between
its importance and its largest cosine similarity to the tokens already picked. The importance is pluggable: attention
in the vision encoder, the size of the token, or any function of the tokens (the authors train one).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.crops import class_attention, feature_layer
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.selection import marginal_relevance
from zoo.engines.tokens import Positions, Stage, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy

Scorer = Callable[[torch.Tensor], torch.Tensor]


@register("idpruner")
class IDPruner(KeepsShare, VisualTokenReducer):
    """Keeps ``round(keep_ratio * N)`` visual tokens that are important and unlike each other."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays (1 - the paper's pruning ratio).",
    )
    mmr_lambda: float = Field(
        0.5, ge=0, le=1, description="Weight of the importance; 1 - lambda weighs the similarity."
    )
    parallel_k: int = Field(
        1, ge=1, description="Tokens picked per round; those of one round do not penalise each other."
    )
    importance: Literal["attention", "norm"] = Field(
        "attention",
        description="What stands in for the authors' trained scorer: attention of [CLS] (encoders without one: "
        "attention received from all patches) in the encoder layer that the projector reads, or the token's norm.",
    )
    scorer: Scorer | None = Field(
        None,
        exclude=True,
        description="Function from visual tokens [N, D] to raw scores [N], such as a trained scorer; replaces "
        "importance. From Python only.",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer."""
        if self.keeps_all:
            return []
        if self.scorer is not None:
            return [Stage(-1, partial(self.select, score=self._scored))]
        if self.importance == "norm":
            return [Stage(-1, partial(self.select, score=lambda view: view.tokens.float().norm(dim=-1)))]
        layer = feature_layer(anatomy)
        score = partial(class_attention, anatomy=anatomy, layer=layer)
        return [Stage(-1, partial(self.select, score=score), observes_encoder=(EncoderWatch(layer),))]

    def select(self, view: View, score: Callable[[View], torch.Tensor]) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        return keep(self.order(view.tokens, score(view)))

    def order(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Indices of the kept rows of ``tokens [N, D]`` with raw ``scores [N]``, in the order of picking."""
        count = self.count(len(tokens))
        return marginal_relevance(tokens, min_max(scores), count, self.mmr_lambda, self.parallel_k)

    def _scored(self, view: View) -> torch.Tensor:
        assert self.scorer is not None
        scores = self.scorer(view.tokens).reshape(-1)
        if len(scores) != len(view.tokens):
            raise BadInput(
                f"the scorer of {self.slug} must return one score for each of {len(view.tokens)} tokens; it "
                f"returned {len(scores)}"
            )
        return scores


def min_max(scores: torch.Tensor) -> torch.Tensor:
    """``scores [N]`` moved to 0 .. 1, float32; all zero when they are equal."""
    scores = scores.float()
    low, high = scores.aminmax()
    return (scores - low) / (high - low + 1e-6)
