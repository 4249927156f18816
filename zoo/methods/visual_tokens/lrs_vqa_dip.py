"""When Large Vision-Language Model Meets Large Remote Sensing Imagery: Coarse-to-Fine Text-Guided Token Pruning
(arXiv 2503.07588, ICCV 2025).

A few decoder layers read the coarse view of the picture with the question. The cells that the last prompt token
attends to most say which tiles of the finer view count; the layers then read the whole picture and those tiles, and the
tile tokens attended to most enter the LLM, beside the whole coarse view and the newline tokens. The paper's focus
module is distilled from the LLM's layers; here these layers themselves, its teacher, score. Coarse and fine view are
the thumbnail and the tiles of the model's own preprocessing.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from zoo.engines.images import ImageView
from zoo.engines.reading_ahead import read_ahead, without_hooks
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import VisualTokenReducer, keep
from zoo.interface import refuse, register
from zoo.methods.visual_tokens.globalcom2 import mosaic
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy, Decoder


@register("lrs-vqa-dip")
class LrsVqaDip(VisualTokenReducer):
    """Keeps the thumbnail, and ``int(keep_ratio * n)`` of the ``n`` tokens of the tiles that the question points to."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Fraction that stays of the tokens of the tiles that were chosen, newlines counted (the paper's "
        "rho); the same fraction of the thumbnail chooses the tiles. Thumbnail and newline tokens come on top.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Keep what scores above this, once the attention is scaled so that its 5% and 95% quantiles become "
        "0 and 1; replaces keep_ratio, except that keep_ratio=1 turns the method off. Newlines must score, too.",
    )
    scoring_layer: int = Field(
        3,
        ge=0,
        description="Decoder layer whose attention scores; it and those before it run first, on their own.",
    )
    choose_tiles: bool = Field(
        True,
        description="Choose tiles by the thumbnail first; otherwise the tokens of all tiles are candidates.",
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse decoders that end before the scoring layer."""
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        if self.scoring_layer >= len(decoder.layers):
            raise refuse(
                self,
                f"a decoder layer {self.scoring_layer} (or a smaller scoring_layer)",
                f"layers 0..{len(decoder.layers) - 1}",
            )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer."""
        if self.keep_ratio == 1:
            return []
        assert anatomy.decoder is not None
        reader = [without_hooks(layer.module) for layer in anatomy.decoder.layers[: self.scoring_layer]]
        return [Stage(-1, partial(self.select, anatomy.decoder, reader))]

    def select(self, decoder: Decoder, reader: list[nn.Module], view: View) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        images = view.images
        candidate = torch.ones(len(view.tokens), dtype=torch.bool, device=view.tokens.device)
        coarse = candidate.clone()
        for image in images:
            coarse[image.tokens] = image.thumbnail
        tiled = [image for image in images if bool(image.thumbnail.any())]
        if self.choose_tiles and tiled:
            logits = read_ahead(view, coarse, decoder, reader, self.scoring_layer)
            for image in tiled:
                candidate[image.tokens] = self.of_chosen_tiles(image, logits[:, image.tokens])
        logits = read_ahead(view, candidate, decoder, reader, self.scoring_layer)
        kept = coarse
        for image in images:
            local = image.tokens[~image.thumbnail]
            attention = among(logits[:, local])
            kept[local[self.chosen(attention, image.newline[~image.thumbnail], candidate[local])]] = True
        return keep(kept.nonzero().squeeze(-1))

    def of_chosen_tiles(self, image: ImageView, logits: torch.Tensor) -> torch.Tensor:
        """Marks the tokens of a picture, ``[n]`` bool: thumbnail, newlines, and the tiles that the thumbnail chooses.

        Args:
            image: with a thumbnail and tiles.
            logits: of the last prompt token to the picture's tokens, ``[H, n]``; only the thumbnail's are read.
        """
        marked = image.thumbnail | image.newline
        own, tiles = image.thumbnail.nonzero().squeeze(-1), (~marked).nonzero().squeeze(-1)
        if not len(tiles):
            return marked
        rows, columns = next(part.grid for part in image.parts if part.thumbnail)
        whole = torch.ones_like(own, dtype=torch.bool)
        cells = self.chosen(among(logits[:, own]), ~whole, whole)
        tile, _, _, arrangement = mosaic(image, tiles)
        hit = tiles_hit(cells, (rows, columns), arrangement)
        marked[tiles] = torch.isin(tile, hit[:, 0] * arrangement[1] + hit[:, 1])
        return marked

    def chosen(self, attention: torch.Tensor, newline: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Kept tokens of one local view by the method's rule; see the two functions."""
        if self.threshold is not None:
            return above_threshold(attention, self.threshold, valid)
        return highest_share(attention, self.keep_ratio, newline, valid)


def highest_share(
    attention: torch.Tensor, share: float, newline: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """The ``int(share * n_valid)`` (at least 1, if any is valid) most attended valid tokens, and all newlines.

    Args:
        attention: ``[N]``.
        share: fraction of the valid tokens.
        newline: ``[N]`` bool.
        valid: tokens that may be chosen, ``[N]`` bool.

    Returns:
        Indices, ascending.
    """
    total = int(valid.sum())
    best = attention.masked_fill(~valid, -float("inf")).topk(min(total, max(1, int(total * share)))).indices
    return newline.index_fill(0, best, True).nonzero().squeeze(-1)


def above_threshold(attention: torch.Tensor, threshold: float, valid: torch.Tensor) -> torch.Tensor:
    """Valid tokens above ``threshold``, when the 5% and 95% quantiles of the valid ones are scaled to 0 and 1.

    Returns:
        Indices, ascending; none when all are alike.
    """
    if not bool(valid.any()):
        return valid.nonzero().squeeze(-1)
    attention = attention.float()
    low, high = torch.quantile(attention[valid], attention.new_tensor([0.05, 0.95])).unbind()
    scaled = (attention - low) / (high - low).clamp(min=1e-12)
    return ((scaled > threshold) & valid).nonzero().squeeze(-1)


def tiles_hit(cells: torch.Tensor, grid: tuple[int, int], tiles: tuple[int, int]) -> torch.Tensor:
    """Tiles of the finer level in which coarse cells lie.

    Args:
        cells: numbers of the cells in row-major order, ``[k]``.
        grid: rows and columns of the coarse level (with a column of newlines, where it has one).
        tiles: rows and columns of tiles of the finer level.

    Returns:
        Row and column of each tile that is hit, in row-major order, ``[t, 2]``.
    """
    row = cells.div(grid[1], rounding_mode="floor") * tiles[0] // grid[0]
    column = cells % grid[1] * tiles[1] // grid[1]
    return torch.stack((row, column), -1).unique(dim=0)


def among(logits: torch.Tensor) -> torch.Tensor:
    """Attention when these keys were all there is, mean over heads: ``logits [H, n]`` -> ``[n]`` float32."""
    return logits.float().softmax(-1).mean(0)
