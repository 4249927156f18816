"""DART: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (arXiv 2502.11494).

In front of decoder layer K a handful of visual and text tokens with the largest keys are pivots. Each pivot in turn
keeps the visual tokens that are least similar to it, among those not yet kept; the others are taken for duplicates.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("dart")
class DART(KeepsShare, VisualTokenReducer):
    """Keeps the image pivots, and an equal number of the least similar tokens for every pivot."""

    keep_ratio: float = Field(
        0.222,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that nominally stays: 128 of 576. The real number is "
        "p_i + floor(nominal / (p_i + p_t)) * (p_i + p_t).",
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Nominal number that stays (the paper's retained tokens); replaces keep_ratio.",
    )
    layer: int = Field(
        2, ge=1, description="First decoder layer that runs short (the paper's K), counted from 0."
    )
    image_pivots: int = Field(4, ge=1, description="Pivots among the visual tokens (p_i).")
    text_pivots: int = Field(4, ge=0, description="Pivots among the text after the image (p_t).")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage in front of layer K, which looks at the keys of layer K-1."""
        assert anatomy.decoder is not None
        select = partial(self.select, norm=anatomy.decoder.norm)
        return [] if self.keeps_all else [Stage(self.layer, select, observes=(self.layer - 1,))]

    def select(self, view: View, norm: nn.Module) -> Keep:
        """The kept tokens of one sample, in sequence order; ``norm`` is the model's final norm."""
        strength = key_strength(view.keys(self.layer - 1))
        image = strongest(strength[view.index], self.image_pivots)
        after = view.text_index > view.index.max()
        text = strongest(strength[view.text_index[after]], self.text_pivots)
        pivots = torch.cat((view.tokens[image], view.text[after][text]))
        return keep(self.retained(norm(view.tokens), norm(pivots), image))

    def retained(self, visual: torch.Tensor, pivots: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Kept rows of ``visual``: the image pivots, then what each pivot keeps, ``[K]``.

        Args:
            visual: normed hidden states of the visual tokens, ``[N, D]``.
            pivots: normed hidden states of all pivots, in the order in which they choose, ``[P, D]``.
            image: which rows of ``visual`` are pivots, ``[p_i]``.
        """
        each = self.per_pivot(len(visual), len(image), len(pivots))
        return torch.cat((image, least_similar(visual, pivots, image, each)))

    def per_pivot(self, tokens: int, image: int, pivots: int) -> int:
        """Tokens that each of ``pivots`` pivots, ``image`` of them visual, keeps of ``tokens``."""
        return min(super().count(tokens), tokens - image) // pivots

    def count(self, tokens: int) -> int:
        """Tokens really kept of ``tokens`` when the prompt has enough text after the image."""
        image = min(self.image_pivots, tokens)
        pivots = image + self.text_pivots
        return image + pivots * self.per_pivot(tokens, image, pivots)


def key_strength(keys: torch.Tensor) -> torch.Tensor:
    """L1 norm of each token's keys ``[H_kv, L, d]`` over heads and channels, ``[L]`` float32.

    With grouped queries, keys repeated for all heads would only scale it.
    """
    return keys.float().abs().sum((0, 2))


def strongest(strength: torch.Tensor, number: int) -> torch.Tensor:
    """Indices of the largest ``strength [N]``, falling; all of them when there are fewer than ``number``."""
    return strength.topk(min(number, len(strength))).indices


def least_similar(visual: torch.Tensor, pivots: torch.Tensor, taken: torch.Tensor, each: int) -> torch.Tensor:
    """For each pivot the ``each`` visual tokens of smallest cosine similarity that nobody has kept before.

    Args:
        visual: ``[N, D]``.
        pivots: in the order in which they choose, ``[P, D]``.
        taken: rows of ``visual`` that no pivot may choose, ``[T]``, with ``T + P * each <= N``.
        each: choices per pivot.

    Returns:
        Rows of ``visual`` in the order of choosing, ``[P * each]``.
    """
    # Half precision would tie, and so misplace, near-duplicates.
    similarity = F.normalize(pivots.float(), dim=-1) @ F.normalize(visual.float(), dim=-1).T
    similarity[:, taken] = float("inf")
    chosen = [taken[:0]]
    for row in similarity:
        best = row.topk(each, largest=False).indices
        chosen.append(best)
        similarity[:, best] = float("inf")
    return torch.cat(chosen)
