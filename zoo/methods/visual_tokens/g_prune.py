"""G-Prune: What Kind of Visual Tokens Do We Need? (arXiv 2501.02268, AAAI 2025).

Before the LLM, projected visual tokens are the nodes of a similarity graph. Their norms flow a few steps along its
row-normalised links; a token is worth the flow that arrives at it, divided by its number of links. Thumbnail and
crops of a tiled picture are separate graphs with the same share; newline tokens take no part and stay.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.reductions import Keep
from zoo.engines.selection import cosine_distances, proportional_shares
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("g-prune")
class GPrune(KeepsShare, VisualTokenReducer):
    """Keeps ``int(keep_ratio * n)`` tokens of every graph: those where the flow gathers."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.5, gt=0, le=1, description="Fraction of each graph's tokens that stays; newline tokens come on top."
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of visual tokens that stay, shared out in proportion to the graphs' sizes; newline "
        "tokens come on top. Replaces keep_ratio.",
    )
    similarity: float = Field(0.5, ge=-1, le=1, description="Smallest cosine of two linked tokens.")
    temperature: float = Field(0.03, gt=0, description="Softmax temperature of the links' weights.")
    iterations: int = Field(5, ge=0, description="Steps that the flow takes.")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer."""
        return [] if self.keeps_all else [Stage(-1, self.select)]

    def select(self, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        graphs, always = [], []
        for image in view.images:
            always.append(image.tokens[image.newline])
            for members in (image.thumbnail, ~image.thumbnail & ~image.newline):
                if bool(members.any()):
                    graphs.append(image.tokens[members])
        counts = self.counts([len(graph) for graph in graphs])
        chosen = [
            graph[self.order(view.tokens[graph], count)] for graph, count in zip(graphs, counts, strict=True)
        ]
        return keep(torch.cat((*always, *chosen)))

    def counts(self, sizes: list[int]) -> list[int]:
        """Tokens kept of graphs of these sizes: ``int(keep_ratio * n)`` each (at least 1), or parts of ``keep_tokens``.

        Raises:
            BadInput: ``keep_tokens`` is more than there are.
        """
        if self.keep_tokens is not None:
            return proportional_shares(self.count(sum(sizes)), sizes)
        return [max(1, int(self.keep_ratio * size)) for size in sizes]

    def order(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the ``count`` best rows of ``tokens [n, D]``, best first."""
        score, _ = graph_flow(tokens, self.similarity, self.temperature, self.iterations)
        return score.topk(count).indices


def graph_flow(
    tokens: torch.Tensor, similarity: float, temperature: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow of the token norms through the similarity graph, per link of the receiving token.

    One vector-matrix product per step replaces the power of the transition matrix. All in float32: half precision
    loses the weak links.

    Args:
        tokens: projected visual tokens of one graph, ``[n, D]``.
        similarity: smallest cosine of two linked tokens.
        temperature: of the softmax over a token's links.
        iterations: steps.

    Returns:
        Score ``[n]`` and degree (the link to itself included) ``[n]``.
    """
    cosine = 1.0 - cosine_distances(tokens)
    linked = (cosine >= similarity) & ((cosine / temperature).abs() >= 1e-6)
    linked.fill_diagonal_(True)
    transition = (cosine / temperature).masked_fill(~linked, -float("inf")).softmax(-1)
    degree = (transition > 0).sum(-1)
    flow = tokens.float().norm(dim=-1)
    for _ in range(iterations):
        flow = flow @ transition
    return flow / degree, degree
