"""ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance (arXiv 2505.18757, version 2).

Before the LLM a diverse subset of the visual tokens grows from a pivot, always by the token whose cosine similarities
to all members sum to the least. Late in the LLM, when text and vision hardly attend to each other any more, all visual
tokens leave.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.images import EncoderWatch
from zoo.engines.reductions import Keep
from zoo.engines.selection import Cosines
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_COMBINE: dict[str, Combine] = {"max_sum": torch.add, "k_center": torch.maximum}


@register("todre")
class ToDRE(KeepsShare, VisualTokenReducer):
    """Keeps a diverse subset before the LLM; drops it late, input by input."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.1, gt=0, le=1, description="Fraction of the visual tokens that enters the LLM (288 of 2880)."
    )
    parts: Literal["both", "diversity", "withdrawal"] = Field(
        "both",
        description="Which stages run. withdrawal alone ignores keep_ratio; otherwise keep_ratio=1 turns all off.",
    )
    diversity: Literal["max_sum", "k_center"] = Field(
        "max_sum",
        description="What the next token minimises: the sum of its similarities to the chosen ones (version 2 of the "
        "paper) or the largest of them (version 1).",
    )
    pivot: Literal["cls", "random"] = Field(
        "cls",
        description="First token: the one [CLS] attends to most in the encoder's last layer, or a random one. "
        "Encoders without [CLS] take a random one.",
    )
    tau: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Visual tokens leave when both attention shares are below this; 0 = never.",
    )
    depth: float = Field(
        7 / 8, gt=0, lt=1, description="Share of the decoder layers after which the attention is tested."
    )
    seed: int = Field(0, ge=0, description="Seed of the random pivot.")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, one in front of layer ``int(depth * L)`` that looks at the layer before it."""
        if self.keeps_all and self.parts != "withdrawal":
            return []
        found = []
        if self.parts != "withdrawal":
            by_cls = self.pivot == "cls" and anatomy.encoder is not None and anatomy.encoder.has_cls
            found.append(
                Stage(
                    -1,
                    partial(self.select, by_cls=by_cls),
                    observes_encoder=(EncoderWatch(-1),) if by_cls else (),
                    seed=self.seed,
                )
            )
        if self.parts != "diversity":
            assert anatomy.decoder is not None
            layer = max(1, int(self.depth * len(anatomy.decoder.layers)))
            # Withdrawn or not, the text keeps the positions that the layers before gave it.
            found.append(Stage(layer, self.withdraw, observes=(layer - 1,), positions="keep"))
        return found

    # --- stage 1 ----------------------------------------------------------------------------------------------

    def select(self, view: View, by_cls: bool) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        return keep(self.order(view.tokens, self.first(view, by_cls)))

    def first(self, view: View, by_cls: bool) -> int:
        """The pivot. Where a picture has a thumbnail beside its tiles, only tokens of the thumbnail are eligible."""
        eligible = torch.zeros(len(view.tokens), dtype=torch.bool, device=view.tokens.device)
        for image in view.images:
            thumbnail = image.thumbnail
            eligible[image.tokens] = thumbnail if bool(thumbnail.any()) else ~image.newline
        if by_cls:
            return int(view.cls_attention(-1).masked_fill(~eligible, -1.0).argmax())
        places = eligible.nonzero().squeeze(-1)
        return int(places[torch.randint(len(places), (), generator=view.generator)])

    def order(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """Indices of the kept rows of ``tokens [N, D]``, in the order of picking."""
        return grow(tokens, first, self.count(len(tokens)), _COMBINE[self.diversity])

    # --- stage 2 ----------------------------------------------------------------------------------------------

    def withdraw(self, view: View) -> Keep:
        """All tokens or none, by how much text and vision attend to each other."""
        layer = view.layer - 1
        text = view.text_index[view.text_index > view.index.min()]
        if not len(text):  # nothing follows the image: the whole text is the question
            text = view.text_index
        related = attention_share(view.received(layer, text), view.index) >= self.tau
        # Rows of vision see text only where some text stands before it.
        if not related and bool(text.min() < view.index.max()):
            related = attention_share(view.received(layer, view.index), text) >= self.tau
        everything = torch.arange(len(view.index), device=view.index.device)
        return keep(everything if related or self.tau == 0 else everything[:0])


def grow(x: torch.Tensor, first: int, count: int, combine: Combine) -> torch.Tensor:
    """Grow a set from one row, always by the row least similar to its members.

    Every row has a running similarity to the set, which one product per pick updates: O(N D), no N x N matrix. Unlike
    the maximum, the sum does not exclude near-duplicates of a member that is far from all others.

    Args:
        x: vectors ``[N, D]``.
        first: the first pick.
        count: number of picks, at most ``N``.
        combine: joins the cosines to a new member into the running similarity: ``torch.add`` for greedy max-sum
            dispersion, ``torch.maximum`` for greedy k-centre.

    Returns:
        Indices in the order of picking, ``[count]``. Ties go to the smaller index.
    """
    cosines = Cosines(x)
    picked = torch.empty(count, dtype=torch.long, device=x.device)
    best = torch.tensor(first, device=x.device)
    similarity = None
    for step in range(count):
        picked[step] = best
        cosine = cosines.row(best)
        similarity = cosine if similarity is None else combine(similarity, cosine)
        best = similarity.index_fill(0, picked[: step + 1], float("inf")).argmin()
    return picked


def attention_share(received: torch.Tensor, places: torch.Tensor) -> float:
    """Part of the attention of some queries that goes to ``places [n]``, mean over heads.

    Args:
        received: attention that each key receives from these queries, ``[H, L]``.
        places: indices of keys.
    """
    mean = received.float().mean(0)
    return float(mean[places].sum() / mean.sum())
