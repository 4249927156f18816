"""PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models (arXiv 2504.08966, CVPR 2025).

In front of an early decoder layer, unimportant visual tokens leave: importance (EUTI) is the attention that the mean
query of the visual tokens would pay, times the norm of the hidden state. The others are clustered by the cosines of
the layer's keys, with a bound on every cluster's radius (DBDPC). Dropped tokens that lie near a centre come back, every
cluster becomes the mean of its tokens, and from that layer on keys weigh as many tokens as they stand for.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.reductions import Merge
from zoo.engines.selection import cosine_distances, unit_rows
from zoo.engines.tokens import Positions, Stage, View
from zoo.engines.upcoming import rotated, upcoming_keys, upcoming_queries
from zoo.families.visual_tokens import VisualTokenReducer
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy


@register("pact")
class PACT(VisualTokenReducer):
    """Prunes, clusters and merges the visual tokens; how many stay depends on the picture."""

    positions: ClassVar[Positions] = "keep"

    important_ratio: float = Field(
        0.55,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that is clustered, the others are pruned (the paper's p).",
    )
    cutoff: float = Field(
        0.21, ge=0, le=2, description="Largest cosine distance of a clustered token from its centre."
    )
    recovery: float = Field(
        1.5,
        ge=0,
        description="Pruned tokens come back within this many cutoffs of a centre (the paper's alpha).",
    )
    bandwidth: float = Field(2.0, gt=0, description="Width of the density's kernel (the paper's d_c).")
    layer: int = Field(4, ge=1, description="First decoder layer that runs short, counted from 0.")
    exact_share: bool = Field(
        False, description="Cluster exactly int(p * N) tokens. False = as in the release: one fewer."
    )
    proportional_attention: bool = Field(
        True, description="Add the logarithm of a cluster's size to its key's attention logits."
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse decoders which take no bias per key."""
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        if decoder is None:
            return
        kernel = decoder.config._attn_implementation
        if self.proportional_attention and not any(name in kernel for name in ("sdpa", "eager")):
            raise refuse(self, "SDPA for its bias per key (or proportional_attention=False)", f"'{kernel}'")

    @property
    def keeps_all(self) -> bool:
        """True when nothing can leave: no token is pruned, and no two are close enough to be merged."""
        return self.important_ratio == 1 and self.cutoff == 0

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage in front of the layer whose keys are clustered."""
        if self.keeps_all:
            return []
        return [Stage(self.layer, partial(self.select, anatomy), weigh=self.proportional_attention)]

    def select(self, anatomy: Anatomy, view: View) -> Merge:
        """The clusters of one sample, in the order of their centres."""
        assert anatomy.decoder is not None
        layer = anatomy.decoder.layers[self.layer]
        keys = upcoming_keys(layer, view.tokens)
        scores = importance(upcoming_queries(layer, view.tokens), keys, view.tokens)
        turned = rotated(anatomy.decoder, keys, view.positions[..., view.index]).transpose(0, 1).flatten(1)
        return self.merge(turned, self.unpruned(scores))

    def unpruned(self, scores: torch.Tensor) -> torch.Tensor:
        """Marks the tokens whose ``scores [N]`` exceed the ``int(p * N)``-th highest, ``[N]`` bool (at least one)."""
        count = max(1, int(self.important_ratio * len(scores)))
        if self.exact_share or count == 1:
            return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, scores.topk(count).indices, True)
        return scores > scores.topk(count).values[-1]

    def merge(self, keys: torch.Tensor, unpruned: torch.Tensor) -> Merge:
        """Clusters, each the plain mean of its tokens.

        Args:
            keys: ``[N, H_kv * d]``, after rotary embedding.
            unpruned: ``[N]`` bool.
        """
        members = unpruned.nonzero().squeeze(-1)
        distances = cosine_distances(keys[members]).clamp(min=0).fill_diagonal_(0)
        centres = members[density_centres(distances, self.cutoff, self.bandwidth)]
        unit = unit_rows(keys)
        nearest = (1 - unit @ unit[centres].T).clamp(min=0).min(dim=1)
        back = unpruned | (nearest.values <= self.recovery * self.cutoff)
        assignment = torch.where(back, nearest.indices, -1)
        assignment[centres] = torch.arange(len(centres), device=centres.device)
        weight = torch.ones(1, len(keys), device=keys.device)
        return Merge(assignment.unsqueeze(0), weight, centres.unsqueeze(0))


def importance(queries: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """EUTI: attention of the tokens' mean query, mean over heads, times the norm of the hidden state.

    Args:
        queries: before rotary embedding, ``[H, N, d]``.
        keys: before rotary embedding, ``[H_kv, N, d]``.
        hidden: ``[N, D]``.

    Returns:
        ``[N]`` float32.
    """
    mean = queries.float().mean(1).view(len(keys), -1, keys.shape[-1])
    attention = (mean @ keys.float().transpose(-1, -2) * keys.shape[-1] ** -0.5).softmax(-1)
    return attention.flatten(0, 1).mean(0) * hidden.float().norm(dim=-1)


def density_centres(distances: torch.Tensor, cutoff: float, bandwidth: float) -> torch.Tensor:
    """DBDPC: centres more than ``cutoff`` apart, such that every point is within ``cutoff`` of one.

    By decreasing density, each point that no centre covers yet becomes one; of equally dense ones the first. A round
    that makes all local maxima of the density centres at once, as the paper has it, finds the same ones.

    Args:
        distances: ``[n, n]``, zero on the diagonal.
        cutoff: radius of a cluster.
        bandwidth: width of the density's kernel.

    Returns:
        Indices in ascending order, ``[centres]``.
    """
    density = torch.exp(-((distances / bandwidth) ** 2)).sum(1)
    centres = []
    # Densities are positive: a covered point never is the maximum while another one is left.
    while bool((density > 0).any()):
        centre = density.argmax()
        centres.append(centre)
        density = density.masked_fill(distances[centre] <= cutoff, 0)
    return torch.stack(centres).sort().values
