"""GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation (arXiv 2311.03035, WACV 2024).

In every block, between attention and MLP, the patches that attention needs least leave, and what they held is spread
over several of those that stay, along a graph of neighbours in space and in content that is built once from the patch
embeddings. Attention loses its smallest entries and counts a token by its scale. No training is needed.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import pad

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.patch_graphs import (
    Rule,
    grid_neighbours,
    nearest_neighbours,
    normalised,
    sparsified,
    standing,
)
from zoo.engines.reductions import Absorb
from zoo.errors import BadInput, Refused
from zoo.families.encoder_tokens import EncoderTokenReducer
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Encoder


@register("gtp-vit")
class GTPViT(EncoderTokenReducer):
    """Removes ``propagated`` patches per block. [CLS], distillation token and registers stay as they are.

    Patches that stay are ordered by falling score, as in the release.
    """

    counts_sizes: ClassVar[bool] = True
    whole_patches: ClassVar[bool] = False

    propagated: int = Field(
        8,
        ge=0,
        description="Patches that leave in each block (P); 0 leaves the model as it is, attention included.",
    )
    sparsity: float = Field(
        0.6,
        gt=0,
        le=1,
        description="Fraction of attention that stays (the paper's theta: kept, not removed).",
    )
    alpha: float = Field(0.1, ge=0, description="How much of a patch that leaves goes to each neighbour.")
    graph: Literal["mixed", "spatial", "semantic"] = Field(
        "mixed", description="Neighbours: the eight around a patch, the most similar ones, or both."
    )
    neighbours: int = Field(8, ge=1, description="Most similar patches that are neighbours (M).")
    selection: Rule = Field(
        "product-max",
        description="What says how much a patch is needed (the release's MixedAttnMax): attention to itself times "
        "attention received, each in the head where it is highest.",
    )
    token_scale: bool = Field(
        True, description="Attention counts a token by its scale: 1 plus what it took in."
    )
    grid: tuple[int, int] | None = Field(
        None, description="Rows and columns of patches, for images that are not square."
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse a rule that reads [CLS] on encoders that have none."""
        super().check(loaded)
        encoder = loaded.anatomy.encoder
        assert encoder is not None
        if self.selection.startswith("cls") and not encoder.has_cls:
            raise Refused(
                f"gtp-vit selects by '{self.selection}', and this encoder has no [CLS]: choose another selection"
            )

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """The graph in front of the first block; then between the halves of every block."""
        if self.propagated == 0:
            return []
        # The release counts neighbours with [CLS] in mind: encoders without one get one neighbour more.
        neighbours = self.neighbours + (0 if encoder.has_cls else 1)

        def connect(view: BlockView) -> None:
            graph = self.connect(view.tokens[:, view.prefix :], neighbours)
            view.memory["graph"] = graph
            # Which patch of the graph each patch of the sequence is.
            view.memory["patches"] = torch.arange(graph.shape[1], device=graph.device).expand(len(graph), -1)

        blocks = range(len(encoder.blocks))
        return [BlockStage(0, connect, "before"), *(BlockStage(block, self.propagate) for block in blocks)]

    def connect(self, patches: torch.Tensor, neighbours: int) -> torch.Tensor:
        """The normalised graph of ``patches [B, n, D]``: ``[B, n, n]`` in float32.

        Raises:
            BadInput: the grid is not square, and ``grid`` does not tell its shape.
        """
        batch, count = patches.shape[:2]
        adjacency = torch.zeros(batch, count, count, dtype=torch.bool, device=patches.device)
        if self.graph != "spatial":
            adjacency |= nearest_neighbours(patches, neighbours)
        if self.graph != "semantic":
            rows, columns = self.grid or (math.isqrt(count),) * 2
            if rows * columns != count:
                raise BadInput(
                    f"gtp-vit cannot lay {count} patches out on a grid of {rows} x {columns}: set grid to the rows "
                    "and columns of patches"
                )
            adjacency |= grid_neighbours(rows, columns, patches.device)
        # Read by columns, so columns lie in one piece.
        return normalised(adjacency).mT.contiguous().mT

    def attend(self, view: BlockView) -> torch.Tensor:
        """Attention without its smallest entries; the map is kept for the choice that follows."""
        attention = view.attention(slice(None))
        if view.valid is not None:  # what padding attends to counts for nothing
            attention = attention * view.valid[:, None, :, None]
        attention = sparsified(attention, self.sparsity)
        view.memory["attention"] = attention
        value = view.seen.value
        return (attention.to(value.dtype) @ value).transpose(1, 2)

    def propagate(self, view: BlockView) -> Absorb | None:
        """The ``propagated`` patches that are needed least leave along the graph."""
        attention: torch.Tensor = view.memory.pop("attention")
        graph: torch.Tensor = view.memory["graph"]
        patches: torch.Tensor = view.memory["patches"]
        count = min(self.propagated, patches.shape[1] - 1)
        if count == 0:
            return None
        score = standing(attention.detach(), self.selection, view.prefix)
        if view.valid is not None:
            score = score.masked_fill(~view.valid[:, view.prefix :], -torch.inf)
        order = score.argsort(dim=1, descending=True, stable=True)
        kept, gone = order[:, :-count], order[:, -count:]
        rows, columns = patches.gather(1, kept), patches.gather(1, gone)
        view.memory["patches"] = rows
        samples = torch.arange(len(graph), device=graph.device).unsqueeze(1)
        given = graph.mT[samples, columns].gather(2, rows.unsqueeze(1).expand(-1, count, -1))
        share = self.alpha * given.mT
        if view.valid is not None:  # padding has nothing to give
            share = share * view.valid.gather(1, gone + view.prefix).unsqueeze(1)
        share = pad(share, (0, 0, view.prefix, 0))
        return Absorb(view.behind_prefix(kept), gone + view.prefix, share, view.tokens.shape[1])

    def key_bias(self, view: BlockView) -> torch.Tensor | None:
        """Log of the token scale; none while no token has taken in anything."""
        return view.sizes.log() if view.merged else None

    def biases(self, encoder: Encoder) -> bool:
        """Only with token scales."""
        return self.token_scale

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """The paper's own figures."""
        return {"patches removed per block": self.propagated, "attention kept": self.sparsity}
