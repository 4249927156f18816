"""LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning
Segmentation (arXiv 2504.10854).

Early decoder layers see a few representatives of the visual tokens (clustering), middle layers see all of them again
(scattering), late layers only those that the question attends to (pruning). Only this order of stages is published;
the rules are reconstructed: farthest points represent the others, a token that comes back gets the update of its
representative, and the last prompt token's attention prunes.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from zoo.engines.crops import class_attention, feature_layer
from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep, Replace
from zoo.engines.scattering import Scatter, ScatterReducer
from zoo.engines.selection import farthest_points, unit_rows
from zoo.engines.tokens import Positions, Stage, TokenReducer, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import VisualTokenReducer, in_proportion, keep
from zoo.interface import register
from zoo.methods.visual_tokens.fastv import visual_scores
from zoo.models.anatomy import Anatomy

LAYERS = (8, 16)
"""First layers of the middle and of the late stage, of 32."""


@register("lvlm-csp")
class LvlmCsp(VisualTokenReducer):
    """Lets early layers see a subset of the visual tokens, middle layers all, late layers a remainder."""

    positions: ClassVar[Positions] = "keep"
    engine: ClassVar[type[TokenReducer]] = ScatterReducer

    keep_ratio: float = Field(
        0.34375,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays, mean over decoder layers (a quarter, all, a "
        "sixteenth: 1 - 0.66 of the image-token FLOPs). The middle layers always see all.",
    )
    late_share: float = Field(
        0.25, ge=0, le=1, description="Visual tokens of the late layers, as a fraction of the early layers'."
    )
    layers: tuple[int, int] | None = Field(
        None,
        description="First layer of the middle and of the late stage, counted from 0. None = 8 and 16 of 32, in "
        "proportion.",
    )
    representatives: Literal["farthest", "attention"] = Field(
        "farthest",
        description="Early tokens: mutually distant ones, or those that [CLS] attends to most (without [CLS]: that "
        "all patches attend to).",
    )
    scatter: Literal["update", "embedding"] = Field(
        "update",
        description="A token that comes back: its embedding plus its representative's update, or the bare embedding.",
    )

    @model_validator(mode="after")
    def _ascending(self) -> LvlmCsp:
        if self.layers is not None and not 0 < self.layers[0] < self.layers[1]:
            raise ValueError("layers must be at least 1 and ascend")
        return self

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """Clustering before the LLM, scattering and pruning in front of the two ``layers``."""
        if self.keep_ratio == 1:
            return []
        assert anatomy.decoder is not None
        depth = len(anatomy.decoder.layers)
        middle, late = self.layers or (
            max(layer, 1 + i) for i, layer in enumerate(in_proportion(LAYERS, depth))
        )
        first, last = self.shares(middle / depth, late / depth)
        watches: tuple[EncoderWatch, ...] = ()
        if self.representatives == "attention":
            watches = (EncoderWatch(feature_layer(anatomy)),)
        return [
            Stage(-1, partial(self.cluster, anatomy, first), observes_encoder=watches),
            Scatter(middle, self.bring_back),
            Stage(late, partial(self.prune, last), observes=(late - 1,)),
        ]

    def shares(self, middle: float, late: float) -> tuple[float, float]:
        """Fractions of the visual tokens in the early and in the late layers, so that the mean is ``keep_ratio``.

        Args:
            middle: depth at which the middle stage begins, as a fraction.
            late: the same for the late stage.

        Raises:
            BadInput: the middle layers alone see more than ``keep_ratio``.
        """
        left = self.keep_ratio - (late - middle)
        if left <= 0:
            raise BadInput(
                f"lvlm-csp: keep_ratio={self.keep_ratio:g} is no more than the {late - middle:.3g} that its middle "
                "layers take, which see all tokens: ask for more, or put the two layers closer together"
            )
        early = left / (middle + (1 - late) * self.late_share)
        if early <= 1:
            return early, early * self.late_share
        return 1.0, min((left - middle) / (1 - late), 1.0)

    def cluster(self, anatomy: Anatomy, share: float, view: View) -> Keep:
        """The representatives, in sequence order; notes the embeddings, and whom each token is represented by."""
        count = max(1, round(share * len(view.tokens)))
        if self.representatives == "attention":
            chosen = class_attention(view, anatomy, feature_layer(anatomy)).topk(count).indices
        else:
            chosen = farthest_points(view.tokens, count)
        kept = keep(chosen)
        view.memory["embeddings"] = view.tokens
        view.memory["representative"] = nearest(view.tokens, kept.index[0])
        return kept

    def bring_back(self, view: View) -> Replace:
        """All tokens in front of the middle layers, ``values [1, total, D]``."""
        representative = view.memory["representative"]
        values = scattered(
            view.tokens, view.memory["embeddings"], view.ordinal, representative, self.scatter == "update"
        )
        members = torch.zeros(view.total, len(view.tokens), device=values.device)
        members.scatter_(1, representative.unsqueeze(1), 1.0)
        places = torch.arange(view.total, device=values.device)
        return Replace(members.unsqueeze(0), places.unsqueeze(0), values.unsqueeze(0))

    def prune(self, share: float, view: View) -> Keep:
        """What the late layers see: the tokens that the last prompt token attends to most, in sequence order."""
        attention = view.attention(view.layer - 1, view.last)[:, 0]
        return keep(visual_scores(attention, view.index).topk(round(share * view.total)).indices)


def nearest(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """For every row of ``x [N, D]`` the one of ``chosen [K]`` with the highest cosine, as a number from 0 to K-1."""
    unit = unit_rows(x)
    member = (unit @ unit[chosen].T).argmax(1)
    member[chosen] = torch.arange(len(chosen), device=x.device)
    return member


def scattered(
    now: torch.Tensor,
    embeddings: torch.Tensor,
    chosen: torch.Tensor,
    representative: torch.Tensor,
    update: bool,
) -> torch.Tensor:
    """Hidden states of all tokens, when only representatives went through the layers before.

    A representative keeps its state ``h_r``; token ``i`` gets ``v_i + (h_r - v_r)`` of its representative ``r``.

    Args:
        now: states of the representatives, ``[K, D]``.
        embeddings: what entered the first layer, ``[N, D]``.
        chosen: which of these the representatives are, ``[K]``.
        representative: of each token, a number from 0 to K-1, ``[N]``.
        update: add the update; otherwise a token comes back as it was.

    Returns:
        ``[N, D]`` in the type of ``now``.
    """
    values = embeddings.float()
    if update:
        values = values + (now.float() - embeddings[chosen].float())[representative]
    return values.to(now.dtype).index_copy(0, chosen, now)
