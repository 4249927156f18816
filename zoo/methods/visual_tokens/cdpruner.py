"""CDPruner: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs
(arXiv 2506.10967, NeurIPS 2025).

Before the LLM, pick a diverse subset of visual tokens conditioned on the question: a determinantal point process whose
kernel is the cosine similarity of the projected tokens, scaled on both sides by each token's relevance to the
question. Greedy MAP inference picks the tokens of each crop.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.crops import Crop, crops_of, keep_per_crop
from zoo.engines.reductions import Keep
from zoo.engines.selection import dpp_map, unit_rows
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("cdpruner")
class CDPruner(KeepsShare, VisualTokenReducer):
    """Keeps visual tokens that are relevant to the question and unlike each other."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.1111,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays (the paper: 192, 128, 64, 32 of 576); every crop gets "
        "the same number.",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer."""
        return [] if self.keeps_all else [Stage(-1, self.select)]

    def select(self, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order.

        The question is the mean embedding of the text behind the pictures (of all text when there is none), which
        shares the space of the projected tokens.
        """
        behind = torch.isin(view.text_index, view.question)
        words = view.text[behind] if bool(behind.any()) else view.text
        crops = crops_of(view)
        made = torch.cat([crop.tokens for crop in crops])  # newline tokens are no candidates
        scores = torch.zeros(len(view.tokens), device=view.tokens.device)
        scores[made] = relevance(view.tokens[made], words.float().mean(0, keepdim=True), sign=1.0)

        def choose(crop: Crop, share: int) -> torch.Tensor:
            return self.order(view.tokens[crop.tokens], scores[crop.tokens], share)

        return keep_per_crop(view, max(1, self.count(len(view.tokens)) // len(crops) * len(crops)), choose)

    def order(self, tokens: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the kept rows of ``tokens [N, D]`` with relevance ``scores [N]``, in the order of picking."""
        return dpp_map(tokens, scores, count)


def relevance(tokens: torch.Tensor, texts: torch.Tensor, sign: float) -> torch.Tensor:
    """Relevance of tokens to a question: mean cosine with its embeddings, scaled to 0 .. 1 over all tokens.

    Args:
        tokens: of all crops of a sample, ``[..., C]``, in one space with the texts.
        texts: embeddings of the parts of the question, ``[M, C]``.
        sign: -1 for CLIP's joint space, where patches that answer the question are the *least* similar to it; 1 for
            embeddings of the LLM.

    Returns:
        ``[...]`` float32.
    """
    cosine = sign * (unit_rows(tokens) @ unit_rows(texts).T).mean(-1)
    low, high = cosine.aminmax()
    spread = high - low
    return (cosine - low + 1e-6) / spread.where(spread > 0, 1e-6)
