"""GlobalCom2: Global Compression Commander (arXiv 2501.05179, AAAI 2026).

For pictures cut into a thumbnail and tiles, before the LLM: the [CLS] scores of the thumbnail say how large a share
each tile may keep and, added to the tile's own [CLS] scores, which of its tokens stay. The thumbnail keeps a fixed
share. Scores are the head mean of the scaled products of [CLS] query and keys, before the softmax. Newline tokens stay.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional as F

from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy


@register("globalcom2")
class GlobalCom2(KeepsShare, VisualTokenReducer):
    """Keeps ``int(keep_ratio * N)`` thumbnail tokens, and of every tile a share that the thumbnail decides."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Fraction of the thumbnail that stays, and mean fraction of the tiles (the paper's rho); newline "
        "tokens come on top.",
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of visual tokens aimed at (the tiles' shares are rounded down one by one); newline tokens "
        "come on top. Replaces keep_ratio.",
    )
    temperature: float = Field(
        10.0, gt=0, description="Softmax temperature of the tiles' summed scores (the paper's tau)."
    )
    encoder_layer: int = Field(
        -1, description="Encoder block whose [CLS] row is read; negative from the end."
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models whose encoder has no [CLS]."""
        super().check(loaded)
        encoder = loaded.anatomy.encoder
        if encoder is None or not encoder.has_cls:
            raise refuse(self, "a vision encoder with a [CLS] token", f"none ({loaded.anatomy.description})")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer."""
        if self.keeps_all:
            return []
        assert anatomy.encoder is not None
        scaling = anatomy.encoder.blocks[self.encoder_layer].attention.scaling
        watch = EncoderWatch(self.encoder_layer)
        return [Stage(-1, partial(self.select, scaling=scaling), observes_encoder=(watch,))]

    def select(self, view: View, scaling: float) -> Keep:
        """The kept tokens of one sample, in sequence order."""
        real = sum(int((~image.newline).sum()) for image in view.images)
        share = self.keep_ratio if self.keep_tokens is None else self.count(real) / real
        return keep(torch.cat([image.tokens[self.choose(image, share, scaling)] for image in view.images]))

    def choose(self, image: ImageView, share: float, scaling: float) -> torch.Tensor:
        """Kept tokens of one picture, as indices into ``image.tokens``."""
        scores = image.on_tokens(cls_logits(image, self.encoder_layer, scaling))
        whole = (image.thumbnail if bool(image.thumbnail.any()) else ~image.newline).nonzero().squeeze(-1)
        kept = [image.newline.nonzero().squeeze(-1), whole[top_scores(scores[whole], share)]]
        tiles = (~image.thumbnail & ~image.newline).nonzero().squeeze(-1)
        if bool(image.thumbnail.any()) and len(tiles):
            tile, place, area, arrangement = mosaic(image, tiles)
            thumbnail = scores[whole].view(next(part.grid for part in image.parts if part.thumbnail))
            ratios = tile_ratios(thumbnail, arrangement, share, self.temperature)
            rows = tile_choices(thumbnail, scores[tiles], tile, place, area, ratios)
            kept += [tiles[row] for row in rows]
        return torch.cat(kept)


def cls_logits(image: ImageView, layer: int, scaling: float) -> torch.Tensor:
    """Scaled products of the [CLS] query with the patches' keys, mean over heads, ``[crops, P]`` float32."""
    query = image.encoder_queries(layer)[:, :, 0].float()
    keys = image.encoder_keys(layer)[:, :, image.prefix :].float()
    return (keys @ query.unsqueeze(-1)).squeeze(-1).mean(1) * scaling


def top_scores(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The ``int(share * n)`` (at least 1) best of ``scores [n]``, best first."""
    return scores.topk(max(1, int(len(scores) * share))).indices


def tile_ratios(
    thumbnail: torch.Tensor, arrangement: tuple[int, int], share: float, temperature: float
) -> torch.Tensor:
    """Share of its tokens that each tile may keep.

    Every cell of the thumbnail votes for the tile that shows it; the last tiles take what division leaves over.

    Args:
        thumbnail: scores ``[rows, columns]``.
        arrangement: rows and columns of tiles.
        share: the mean.
        temperature: of the softmax over tiles.

    Returns:
        ``[tiles]`` in row-major order, each at most 1.
    """
    for axis, tiles in enumerate(arrangement):
        size = thumbnail.shape[axis]
        owner = (torch.arange(size, device=thumbnail.device) // max(1, size // tiles)).clamp(max=tiles - 1)
        summed = thumbnail.new_zeros([tiles if i == axis else n for i, n in enumerate(thumbnail.shape)])
        thumbnail = summed.index_add(axis, owner, thumbnail)
    votes = thumbnail.flatten()
    weight = ((votes - votes.max()) / temperature).exp()
    weight = weight / (weight.sum() + 1e-8)
    return (share * (1 + weight - weight.mean())).clamp(max=1)


def mosaic(
    image: ImageView, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Where the tokens of the tiles stand in the picture.

    Args:
        image: a picture with a thumbnail and tiles.
        tokens: its tile tokens, as indices into ``image.tokens``, ``[n]``.

    Returns:
        Tile of each token in row-major order ``[n]``; its row and column over all tiles, padding cut off, ``[n, 2]``;
        rows and columns of tokens; rows and columns of tiles.
    """
    assert image.boxes is not None
    numbers = sorted({crop for part in image.parts if not part.thumbnail for crop in part.crops})
    corners = {crop: (round(image.boxes[crop][1], 6), round(image.boxes[crop][0], 6)) for crop in numbers}
    across, down = (sorted({corner[axis] for corner in corners.values()}) for axis in (1, 0))
    place = image.coordinates[tokens].clone()
    tile = torch.empty_like(image.crop[tokens])
    for crop, (top, left) in corners.items():
        row, column = down.index(top), across.index(left)
        own = image.crop[tokens] == crop
        tile[own] = row * len(across) + column
        part = next(part for part in image.parts if crop in part.crops and not part.thumbnail)
        if part.crops == (crop,):  # a grid of its own; tiles that were joined have common coordinates
            place[own] += place.new_tensor([row * part.grid[0], column * part.grid[1]])
    rows, columns = (place.max(0).values + 1).tolist()
    return tile, place, (rows, columns), (len(down), len(across))


def tile_choices(
    thumbnail: torch.Tensor,
    scores: torch.Tensor,
    tile: torch.Tensor,
    place: torch.Tensor,
    area: tuple[int, int],
    ratios: torch.Tensor,
) -> list[torch.Tensor]:
    """Tokens that each tile keeps: the best sums of its own and the thumbnail's scores, each of norm 1.

    Args:
        thumbnail: scores ``[rows, columns]``; stretched over the picture by bilinear interpolation.
        scores: of the tiles' tokens, ``[n]``.
        tile: of each token, ``[n]``.
        place: row and column of each token in the whole picture, ``[n, 2]``.
        area: rows and columns of the whole picture.
        ratios: share of each tile, ``[tiles]``.

    Returns:
        For each tile indices into ``scores``, best first: ``int(n_tile * ratio)`` of them.
    """
    stretched = F.interpolate(thumbnail[None, None].float(), size=area, mode="bilinear", align_corners=False)
    overall = stretched[0, 0, place[:, 0], place[:, 1]]
    chosen = []
    for number, ratio in enumerate(ratios.tolist()):
        own = (tile == number).nonzero().squeeze(-1)
        total = F.normalize(scores[own], dim=0) + F.normalize(overall[own], dim=0)
        chosen.append(own[total.topk(int(len(own) * ratio)).indices])
    return chosen
