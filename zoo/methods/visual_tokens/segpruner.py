"""SeGPruner: Semantic-Geometric Visual Token Pruner for 3D Question Answering (arXiv 2603.29437).

View by view, a share of the budget goes to the patches that receive most attention in the encoder. Farthest-point
sampling fills it, under a distance that mixes how far apart two patches lie in the scene (depth, back-projected with
the camera's pose) and how different their features are.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from zoo.engines.crops import feature_layer
from zoo.engines.images import EncoderWatch, ImageView
from zoo.engines.reductions import Keep
from zoo.engines.selection import Cosines, farthest_from
from zoo.engines.tokens import Positions, Stage, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("segpruner")
class SeGPruner(KeepsShare, VisualTokenReducer):
    """Keeps the attended, and the mutually distant, tokens of every view of a scene."""

    positions: ClassVar[Positions] = "renumber"

    keep_ratio: float = Field(
        393 / 729,
        gt=0,
        le=1,
        description="Fraction of each view's tokens that stays; newline tokens come on top.",
    )
    keep_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of tokens of each view that stay (the paper's T); replaces keep_ratio.",
    )
    important_ratio: float = Field(
        0.0, ge=0, le=1, description="Share of the budget for the most attended tokens (the paper's r)."
    )
    geometry_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the distance in space (the paper's lambda); 0 without a scene.",
    )
    scene: Path | None = Field(
        None,
        description="NPZ file with the geometry of the views: depths [V, S, S] in metres, cam2world [V, 4, 4], "
        "intrinsic [3, 3]. View k belongs to the k-th picture of each prompt. None = features alone decide.",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage before the LLM, which looks at the encoder layer that is projected.

        Raises:
            BadInput: the scene cannot be read.
        """
        if self.keeps_all:
            return []
        scene = None if self.scene is None else read_scene(self.scene)
        layer = feature_layer(anatomy)
        watch = EncoderWatch(layer, hidden=True)
        return [Stage(-1, partial(self.select, layer, scene), observes_encoder=(watch,))]

    def select(self, layer: int, scene: Scene | None, view: View) -> Keep:
        """The kept tokens of one sample, in sequence order.

        Raises:
            BadInput: the pictures are not those of the scene.
        """
        if scene is not None and len(scene.depths) != len(view.images):
            raise BadInput(
                f"the scene has {len(scene.depths)} views, but this prompt has {len(view.images)} pictures: "
                "give one picture per view, in order"
            )
        kept = []
        for number, image in enumerate(view.images):
            features = image.on_tokens(image.encoder_hidden(layer)[:, image.prefix :].float())
            attention = image.on_tokens(image.encoder_received(layer)[:, :, image.prefix :].mean(1))
            centres = None if scene is None else scene.centres(number, image).to(features.device)
            kept.append(image.tokens[image.newline])
            for part in range(len(image.parts)):
                own = (image.part == part).nonzero().squeeze(-1)
                kept.append(image.tokens[own[self.order(features[own], attention[own], centres)]])
        return keep(torch.cat(kept))

    def order(
        self, features: torch.Tensor, attention: torch.Tensor, centres: torch.Tensor | None
    ) -> torch.Tensor:
        """Kept tokens of one view: the important ones by descending attention, then the picks.

        Args:
            features: encoder features ``[N, C]``.
            attention: that each token receives, ``[N]``.
            centres: of the patches in the scene, ``[N, 3]``; ``None`` = unknown.
        """
        count = self.count(len(features))
        ranked = attention.argsort(descending=True, stable=True)
        important = int(count * self.important_ratio)
        if important == count:
            return ranked[:count]
        rest = ranked[important:]
        distances = mixed_distances(
            features[rest], None if centres is None else centres[rest], self.geometry_weight
        )
        first = torch.zeros((), dtype=torch.long, device=rest.device)
        picked = farthest_from(distances, first, len(rest), count - important)
        return torch.cat((ranked[:important], rest[picked]))


def mixed_distances(
    features: torch.Tensor, centres: torch.Tensor | None, weight: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Distance between patches: ``weight`` parts in space, the others between features (one minus the cosine).

    Args:
        features: ``[N, C]``.
        centres: of the patches in the scene, ``[N, 3]``; ``None`` = features alone count.
        weight: 0 to 1.

    Returns:
        A function from the index ``[]`` of a patch to its distances to all, ``[N]``.
    """
    in_features = Cosines(features).distances
    if centres is None:
        return in_features

    def in_space(index: torch.Tensor) -> torch.Tensor:
        point = centres[index.reshape(1)]
        return torch.cdist(point, centres, compute_mode="donot_use_mm_for_euclid_dist")[0]

    # The unit is the reach of the first pick; a view that collapses to one point (no depth) has none.
    first = torch.zeros((), dtype=torch.long, device=centres.device)
    reach = in_space(first).max().clamp(min=torch.finfo(centres.dtype).tiny)
    return lambda index: weight * in_space(index) / reach + (1 - weight) * in_features(index)


def patch_centres(
    depths: torch.Tensor, cam2world: torch.Tensor, intrinsic: torch.Tensor, patch: int
) -> torch.Tensor:
    """Mean world position of the pixels of each patch; pixels that no whole patch covers, right and below, are cut off.

    Pixels without depth (0) lie in the camera's centre, and count.

    Args:
        depths: metres along the optical axis, ``[V, H, W]``.
        cam2world: poses ``[V, 4, 4]``.
        intrinsic: pinhole camera matrix in pixels, ``[3, 3]``.
        patch: side of a patch in pixels.

    Returns:
        ``[V, N, 3]``, in raster order.
    """
    views, height, width = depths.shape
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = (u.to(depths) - intrinsic[0, 2]) / intrinsic[0, 0] * depths
    y = (v.to(depths) - intrinsic[1, 2]) / intrinsic[1, 1] * depths
    camera = torch.stack((x, y, depths, torch.ones_like(depths)), dim=1).flatten(2)
    world = (cam2world @ camera)[:, :3].view(views, 3, height, width)
    return torch.nn.functional.avg_pool2d(world, patch).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Scene:
    """Depth maps and cameras of several views; see ``patch_centres`` for the arrays."""

    depths: torch.Tensor
    cam2world: torch.Tensor
    intrinsic: torch.Tensor

    def centres(self, number: int, image: ImageView) -> torch.Tensor:
        """Patch centres of view ``number`` for the tokens of its picture, ``[N, 3]``.

        Raises:
            BadInput: the picture was cut into tiles, or its tokens are not the patches of the depth map.
        """
        if image.grid is None or len(image.grid) != 2:
            raise BadInput(
                "segpruner knows where whole views stand in a scene, not tiles or videos: drop the scene"
            )
        rows, columns = image.grid
        height, width = self.depths.shape[1:]
        patch = height // rows
        if patch == 0 or patch != width // columns:
            raise BadInput(
                f"depth maps of {height}x{width} pixels do not fit {rows}x{columns} tokens: "
                "render them as large as the model's input pictures"
            )
        keep_view = slice(number, number + 1)
        return patch_centres(self.depths[keep_view], self.cam2world[keep_view], self.intrinsic, patch)[0]


def read_scene(path: Path) -> Scene:
    """Read and check the geometry of a scene; see :class:`SeGPruner`.

    Raises:
        BadInput: the file is missing, is no NPZ, lacks an array, or an array has a wrong shape.
    """
    names = ("depths", "cam2world", "intrinsic")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [torch.from_numpy(file[name]).float() for name in names]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{path} is no scene: an NPZ file with {', '.join(names)} is needed ({error})"
        ) from None
    depths, cam2world, intrinsic = arrays
    if depths.dim() != 3 or cam2world.shape != (len(depths), 4, 4) or intrinsic.shape != (3, 3):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in zip(names, arrays, strict=True))
        raise BadInput(
            f"{path} has {shapes}; needed: depths [V, S, S], cam2world [V, 4, 4], intrinsic [3, 3]"
        )
    return Scene(depths, cam2world, intrinsic)
