"""Visual tokens by *crop*: the run of the vision encoder that read them (a whole picture, a tile, a frame).

Methods that rank tokens by what the encoder saw give each crop its own share of the budget, because attention scores
of two runs cannot be compared. Newline tokens, which no crop made, are never candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zoo.engines.images import ImageView
from zoo.engines.reductions import Keep, Replace, Transform
from zoo.engines.selection import proportional_shares
from zoo.engines.views import View
from zoo.models.anatomy import Anatomy


@dataclass(frozen=True)
class Crop:
    """The visual tokens of one run of the encoder.

    Attributes:
        image: the picture it belongs to.
        number: within the picture.
        tokens: numbers of its tokens in ``view.tokens``, ascending, ``[n]``.
        part: number of the grid (``image.parts``) in which they stand; tiles that were joined share one.
    """

    image: ImageView
    number: int
    tokens: torch.Tensor
    part: int

    @property
    def stretch(self) -> tuple[int, int, int]:
        """Equal for crops that the model has joined to one grid of tokens (the frames of a video stay apart)."""
        return (id(self.image), self.part, self.number if self.image.video else -1)

    @property
    def columns(self) -> int:
        """Tokens per row: what is left of a crop when padding was cut off is still a rectangle."""
        own = self.image.coordinates[self.image.crop == self.number]
        return len(own[:, -1].unique())


def crops_of(view: View) -> list[Crop]:
    """The crops of a sample that have visual tokens, in the order of the prompt."""
    found = []
    for image in view.images:
        crop, part = image.crop, image.part
        for number in range(image.crops):
            own = (crop == number).nonzero().squeeze(-1)
            if len(own):
                found.append(Crop(image, number, image.tokens[own], int(part[own[0]])))
    return found


def shares_of(crops: list[Crop], budget: int) -> list[int]:
    """Tokens that each crop may keep: in proportion to its tokens, so crops of one size get equal shares."""
    return proportional_shares(budget, [len(crop.tokens) for crop in crops])


def keep_per_crop(view: View, budget: int, choose: Callable[[Crop, int], torch.Tensor]) -> Keep:
    """Keep ``budget`` tokens of a sample, crop by crop, in sequence order.

    Args:
        view: the sample.
        budget: tokens to keep of the whole sample.
        choose: from a crop and its share to the kept ones among its tokens (numbers within the crop), ``[share]``.
    """
    crops = crops_of(view)
    kept = [
        crop.tokens[choose(crop, share)]
        for crop, share in zip(crops, shares_of(crops, budget), strict=True)
        if share
    ]
    return Keep(torch.cat(kept).sort().values.unsqueeze(0))


def feature_layer(anatomy: Anatomy) -> int:
    """Number of the encoder layer whose output is projected (the last of several), counted from the end.

    Only negative numbers mean the same block for hidden states and for attention: hidden state ``k`` is the output of
    block ``k - 1``.
    """
    layer = anatomy.feature_layer
    if layer is None:
        return -1
    number = layer if isinstance(layer, int) else layer[-1]
    assert anatomy.encoder is not None
    return number if number < 0 else number - len(anatomy.encoder.blocks) - 1


def class_attention(view: View, anatomy: Anatomy, layer: int) -> torch.Tensor:
    """Attention of ``[CLS]`` to each visual token in an encoder layer, ``[N]`` float32.

    Without a ``[CLS]`` the attention that the token receives from all patches, mean over these: the substitute that
    most ports take.
    """
    assert anatomy.encoder is not None
    return view.cls_attention(layer) if anatomy.encoder.has_cls else view.mean_attention(layer)


def on_tokens(view: View, values: Callable[[ImageView], torch.Tensor]) -> torch.Tensor:
    """Values of encoder patches, brought to the visual tokens (mean over a token's patches), ``[N, ...]`` float32.

    Args:
        view: the sample.
        values: from a picture to values of its patches ``[crops, P, ...]``. Newline tokens get 0.
    """
    result: torch.Tensor | None = None
    for image in view.images:
        part = image.on_tokens(values(image).float())
        if result is None:
            result = part.new_zeros(len(view.tokens), *part.shape[1:])
        result[image.tokens] = part
    assert result is not None
    return result


def projects_patches(view: View, anatomy: Anatomy) -> bool:
    """True when each visual token is one patch of one encoder layer, sent through the projector on its own.

    Then merging may happen before the projector, where the papers do it.
    """
    return (
        anatomy.drops_cls
        and anatomy.projector is not None
        and isinstance(anatomy.feature_layer, int)
        and all(image.patches.shape[1] == 1 for image in view.images)
    )


def distinct_places(wanted: torch.Tensor, size: int) -> torch.Tensor:
    """A place of its own for each output token of a crop.

    Args:
        wanted: number of the token whose place it would take, ``[K]``; -1 = none. Whoever comes second gets one of
            the free places, the lowest first.
        size: tokens of the crop, at least ``K``.

    Returns:
        ``[K]``, all different.
    """
    places, taken = wanted.tolist(), set()
    homeless = []
    for number, place in enumerate(places):
        if place < 0 or place in taken:
            homeless.append(number)
        taken.add(place)
    free = (place for place in range(size) if place not in taken)
    for number in homeless:
        places[number] = next(free)
    return torch.tensor(places, device=wanted.device)


def merged_tokens(
    view: View, anatomy: Anatomy, matrix: torch.Tensor, places: torch.Tensor, more: torch.Tensor | None = None
) -> Transform:
    """New tokens as sums of old ones, taken before the projector where patches are projected on their own.

    Elsewhere (pixel shuffle, patch mergers, interpolated tiles) the same sums are taken of the projected tokens, and
    come in the order of their places: on such models a token's place in a grid means more than its rank. The stage
    must watch the hidden state of ``feature_layer(anatomy)``.

    Args:
        view: the sample.
        anatomy: of its model.
        matrix: weights of the visual tokens, and of ``more``, in each new token, ``[K, N + M]`` float32.
        places: number of the visual token whose place each takes, all different, ``[K]``.
        more: encoder features that can be used beside those of the tokens (such as ``[CLS]``), ``[M, C]``; only where
            ``projects_patches``.
    """
    size = len(view.tokens)
    if not projects_patches(view, anatomy):
        order = places.argsort()
        return Transform(matrix[order, :size].unsqueeze(0), places[order].unsqueeze(0))
    layer = feature_layer(anatomy)
    features = on_tokens(view, lambda image: image.encoder_hidden(layer)[:, image.prefix :])
    if more is not None:
        features = torch.cat((features, more.float()))
    assert anatomy.projector is not None
    values = anatomy.projector((matrix @ features).to(view.tokens.dtype))
    return Replace(matrix[:, :size].unsqueeze(0), places.unsqueeze(0), values.unsqueeze(0))
