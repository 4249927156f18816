"""PruneVid: Visual Token Pruning for Efficient Video Large Language Models (arXiv 2412.16117, ACL 2025 Findings).

Before the LLM, frames are clustered into stretches of time; places that stay alike throughout a stretch are averaged
over its frames, and what is left is clustered within each frame. In front of a middle decoder layer, the tokens that no
head of the question looked at leave, and so do their keys in the caches of all earlier layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.frames import films_of, outside_of, standing
from zoo.engines.reductions import Join, Keep
from zoo.engines.selection import best_of_each, cluster_dpc_knn, rows_of_question
from zoo.engines.stretches import contiguous, static_places
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy

FEWEST = 14
"""Groups of no more tokens are not clustered."""


@register("prunevid")
class PruneVid(VisualTokenReducer):
    """Merges what stands still in a video, then keeps what the question looks at; how many depends on the video."""

    positions: ClassVar[Positions] = "renumber"

    static_threshold: float = Field(
        0.8,
        description="A place is static when its tokens in the frames of a stretch have a higher mean cosine (the "
        "paper's tau).",
    )
    segment_ratio: float = Field(
        0.25, gt=0, le=1, description="Clusters of frames, as a fraction of the frames."
    )
    cluster_ratio: float = Field(
        0.5, gt=0, le=1, description="Tokens left of those clustered in space; 1 = none is merged there."
    )
    neighbours: int = Field(7, ge=1, description="Nearest neighbours that make the density of a point.")
    inside_ratio: float = Field(
        0.4,
        gt=0,
        le=1,
        description="Fraction of the merged tokens that stays at `layer` (the paper's alpha).",
    )
    layer: int = Field(
        11,
        ge=1,
        description="First decoder layer that runs short, counted from 0: the one behind the layer whose attention "
        "ranks (the paper's M is layer - 1).",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """Merging before the LLM, pruning in front of ``layer``."""
        stages = [Stage(-1, self.merge)]
        if self.inside_ratio < 1:
            stages.append(
                Stage(self.layer, self.prune, observes=(self.layer - 1,), positions="keep", trims=0)
            )
        return stages

    def merge(self, view: View) -> Join:
        """The merged tokens of one sample; newlines stay as they are."""
        films = [film.tokens for film in films_of(view)]
        others = outside_of(len(view.tokens), films, view.index.device)
        assignment = torch.empty(len(view.tokens), dtype=torch.long, device=view.index.device)
        assignment[others] = torch.arange(len(others), device=others.device)
        anchors, keys, groups = [others], [others], [torch.full_like(others, -1)]
        made, kinds = len(others), 0
        for film in films:
            plan = self.plan(view.tokens[film])
            assignment[film.flatten()] = plan.assignment + made
            anchors.append(film.flatten()[plan.first])
            keys.append(standing(film, plan.first))
            groups.append(plan.group + kinds)
            made, kinds = made + len(plan.group), kinds + int(plan.group.max()) + 1
        anchor = torch.cat(anchors)
        group = torch.full((view.total,), -1, device=anchor.device)
        group[view.ordinal[anchor]] = torch.cat(groups)
        view.memory["prunevid.group"] = group
        order = torch.cat(keys).argsort(stable=True)
        target = order.argsort()[assignment]
        moves = torch.ones_like(assignment, dtype=torch.bool)
        moves[anchor] = False
        moved = moves.nonzero().squeeze(-1)
        return Join(
            anchor[order].unsqueeze(0), moved.unsqueeze(0), target[moved].unsqueeze(0), len(view.tokens)
        )

    def plan(self, x: torch.Tensor) -> Plan:
        """What becomes of the frames ``x [F, P, D]`` of one video."""
        frames, places, _ = x.shape
        x = x.float()
        numbers = torch.arange(frames * places, device=x.device).view(frames, places)
        assignment = torch.empty(frames * places, dtype=torch.long, device=x.device)
        groups: list[int] = []
        windows, sizes = [], []
        start = 0
        for _, run in groupby(contiguous(self.frame_clusters(x))):
            window = slice(start, start + len(list(run)))
            windows.append(window.stop - start)
            static = static_places(x[window]) > self.static_threshold
            before = len(groups)
            # Static places of a stretch are one point each, dynamic ones one in every frame.
            parts = [(numbers[window][:, static], x[window][:, static].mean(0))]
            parts += [
                (numbers[frame, ~static].unsqueeze(0), x[frame, ~static])
                for frame in range(start, window.stop)
            ]
            for part, (cells, points) in enumerate(parts):
                member = self.spatial_clusters(points)
                assignment[cells] = (member + len(groups)).expand_as(cells)
                kind = groups[-1] + 1 if groups else 0
                groups += [kind] * (int(member.max()) + 1 if len(member) else 0)
                if part == 0:
                    sizes.append((len(groups) - before, 0))
            sizes[-1] = (sizes[-1][0], len(groups) - before - sizes[-1][0])
            start = window.stop
        return Plan(assignment, torch.tensor(groups, device=x.device), tuple(windows), tuple(sizes))

    def frame_clusters(self, x: torch.Tensor) -> list[int]:
        """Cluster of each frame of ``x [F, P, D]``, by the mean of its tokens, ``[F]``."""
        frames = len(x)
        clusters = max(1, int(frames * self.segment_ratio))
        return cluster_dpc_knn(x.mean(1), clusters, min(self.neighbours, frames))[1].tolist()

    def spatial_clusters(self, x: torch.Tensor) -> torch.Tensor:
        """Cluster of each of ``x [n, D]``, ``[n]``; few tokens are left alone."""
        if len(x) <= FEWEST or self.cluster_ratio == 1:
            return torch.arange(len(x), device=x.device)
        clusters = max(1, int(len(x) * self.cluster_ratio))
        return cluster_dpc_knn(x, clusters, min(self.neighbours, len(x)))[1]

    def prune(self, view: View) -> Keep:
        """What stays in front of ``layer``, in sequence order."""
        scores = strongest(view, self.layer - 1)[view.index]
        return keep(self.survivors(scores, view.memory["prunevid.group"][view.ordinal]))

    def survivors(self, scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """The best ``int(inside_ratio * size)`` of each group.

        Args:
            scores: ``[N]``.
            group: of each token ``[N]``; tokens of group -1 all stay.

        Returns:
            Indices in ascending order, ``[K]``.
        """
        quota = ((group + 1).bincount().double() * self.inside_ratio).long()
        kept = best_of_each(scores, group + 1, quota)
        return (kept | (group < 0)).nonzero().squeeze(-1)


@dataclass(frozen=True)
class Plan:
    """What becomes of a video: every output token is the mean of a set of its tokens.

    Attributes:
        assignment: output token of each token ``frame * P + p``, ``[F * P]``. Stretch by stretch: static tokens, then
            dynamic tokens frame by frame.
        group: of each output token: the static ones of a stretch are one group, the dynamic ones of a frame another,
            ``[K]``.
        windows: frames of each stretch.
        sizes: static and dynamic output tokens of each stretch.
    """

    assignment: torch.Tensor
    group: torch.Tensor
    windows: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def first(self) -> torch.Tensor:
        """The first token that goes into each output token, ``[K]``."""
        numbers = torch.arange(len(self.assignment), device=self.assignment.device)
        start = torch.full_like(self.group, len(numbers))
        return start.scatter_reduce(0, self.assignment, numbers, "amin")


def strongest(view: View, layer: int) -> torch.Tensor:
    """Largest attention that any head of any question token pays each token in ``layer``, ``[L]`` float32.

    Rows are computed a few at a time, so that no full map exists.
    """
    rows = rows_of_question(view.text_index, view.index)
    peaks = [view.attention(layer, some).amax((0, 1)) for some in rows.split(8)]
    return torch.stack(peaks).amax(0)
