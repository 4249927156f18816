"""Visual tokens by *film*: the frames of one video, or a still picture as a film of one frame.

Methods for video compare the same place in neighbouring frames. Architectures hand videos over in different ways: as
one picture with a time axis (LLaVA-OneVision, Qwen-VL), or as many pictures with text between them (InternVL,
SmolVLM). Here all of them are ``frames x places``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zoo.engines.crops import feature_layer
from zoo.engines.images import ImageView
from zoo.engines.reductions import Keep, Reduction, Transform
from zoo.engines.views import View
from zoo.models.anatomy import Anatomy

Woven = tuple[torch.Tensor, torch.Tensor]
"""What becomes of a film: places ``frame * P + p`` that its outputs take ``[K]``, and their weights ``[K, F * P]``."""


@dataclass(frozen=True)
class Film:
    """Frames of one grid.

    Attributes:
        tokens: numbers of its tokens in ``view.tokens``, ``[F, P]``; each frame in raster order.
        grid: rows and columns of a frame, ``rows * columns = P``.
        image: the video it is, when the model gets it as one.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    image: ImageView | None = None


def films_of(view: View, pictures: bool = True) -> list[Film]:
    """The films of a sample, in the order of the prompt. Newlines and prefix tokens belong to none.

    Neighbouring pictures of one part and one grid are frames of one film: so some models get their videos. Other
    pictures are stills: each of their parts (thumbnail, tile, mosaic) is a film of one frame.

    Args:
        view: of a stage before the LLM that observes something of the encoder.
        pictures: count stills in.
    """
    films: list[Film] = []
    run: list[ImageView] = []

    def end_run() -> None:
        if run:
            tokens = torch.stack([_grid_tokens(image, 0) for image in run])
            films.append(Film(tokens, _grid(run[0])))
        run.clear()

    for image in view.images:
        if image.video or len(image.parts) > 1:
            end_run()
            for part in range(len(image.parts)):
                tokens = _grid_tokens(image, part)
                rows, columns = image.parts[part].grid[-2:]
                films.append(
                    Film(tokens.view(-1, rows * columns), (rows, columns), image if image.video else None)
                )
            continue
        if run and image.parts[0].grid != run[0].parts[0].grid:
            end_run()
        run.append(image)
    end_run()
    return [film for film in films if pictures or len(film.tokens) > 1]


def _grid(image: ImageView) -> tuple[int, int]:
    rows, columns = image.parts[0].grid[-2:]
    return rows, columns


def _grid_tokens(image: ImageView, part: int) -> torch.Tensor:
    """Tokens of one part in the order of its grid, ``[cells]``."""
    own = (image.part == part).nonzero().squeeze(-1)
    number = torch.zeros_like(own)
    for axis, size in zip(image.coordinates[own].T, image.parts[part].grid, strict=True):
        number = number * size + axis
    return image.tokens[own[number.argsort()]]


def grid_of(coordinates: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a complete grid whose cells have ``coordinates [P, 2]``."""
    rows, columns = (coordinates.amax(0) + 1).tolist()
    return rows, columns


def pooling(anatomy: Anatomy) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The model's own pooling of video frames behind the projector, ``[F, P, D] -> [F, P', D]``, if it has one."""
    pool: Callable[[torch.Tensor], torch.Tensor] | None = getattr(anatomy.vlm, "apply_pooling", None)
    return pool


def before_pooling(anatomy: Anatomy, film: Film) -> torch.Tensor | None:
    """Projected patches ``[F, P', D]`` of a video that the model pools behind the projector; ``None`` otherwise.

    The stage must observe the hidden state of the layer that feeds the projector. Projecting anew costs far less than
    one decoder layer, and nothing for architectures that do not pool.
    """
    if film.image is None or pooling(anatomy) is None or anatomy.projector is None:
        return None
    hidden = film.image.encoder_hidden(feature_layer(anatomy))[:, film.image.prefix :]
    projected: torch.Tensor = anatomy.projector(hidden)
    return projected


def patch_attention(image: ImageView, layer: int) -> torch.Tensor:
    """Attention that each patch receives in an encoder layer, mean over heads and queries, ``[crops, P']``."""
    return image.encoder_received(layer)[:, :, image.prefix :].mean(1)


def attention_received(
    view: View, anatomy: Anatomy, layer: int, images: Sequence[ImageView] | None = None
) -> torch.Tensor:
    """``patch_attention`` of the patches of each visual token, ``[N]`` float32; newline tokens get 0.

    Patches are brought to tokens as the model does it: by its own pooling of frames, otherwise as a plain mean.

    Args:
        view: the sample.
        anatomy: of the model.
        layer: number of the attention; the stage must observe it.
        images: which pictures; tokens of the others get 0. ``None`` = all.
    """
    pool = pooling(anatomy)
    result = torch.zeros(len(view.tokens), device=view.tokens.device)
    for image in view.images if images is None else images:
        patches = patch_attention(image, layer)
        if image.video and pool is not None:
            result[_grid_tokens(image, 0)] = pool(patches.unsqueeze(-1)).flatten()
        else:
            result[image.tokens] = image.on_tokens(patches)
    return result


def weave(tokens: int, films: Sequence[torch.Tensor], outputs: Sequence[Woven]) -> Transform:
    """One map of all visual tokens of a sample, from what becomes of each film.

    What no film holds stays as it is, except newlines behind nothing: such a token leaves when all tokens between it
    and the one before it have left. A film keeps the order of its outputs; when other tokens (newlines of rows) stand
    inside it, its outputs go where their places are.

    Args:
        tokens: visual tokens of the sample, ``N``.
        films: their numbers, ``[F, P]`` each.
        outputs: one per film.
    """
    device = films[0].device if films else None
    owned = torch.zeros(tokens, dtype=torch.bool, device=device)
    anchor, key, blocks = [], [], []
    for film, (place, matrix) in zip(films, outputs, strict=True):
        flat = film.flatten()
        owned[flat] = True
        alone = int(flat.max() - flat.min()) + 1 == len(flat)
        anchor.append(flat[place])
        key.append(flat.min().expand(len(place)) if alone else flat[place])
        blocks.append((flat, matrix))
    # Numbered by how many other tokens stand in front, candidates and the token that ends them share a group.
    group = (~owned).long().cumsum(0) - (~owned).long()
    present = torch.zeros(tokens + 1, dtype=torch.long, device=device)
    candidates = present.index_add(0, group[owned], torch.ones_like(group[owned]))
    placed = torch.cat(anchor) if anchor else group[:0]
    survivors = present.index_add(0, group[placed], torch.ones_like(placed))
    other = (~owned & ((candidates == 0) | (survivors > 0))[group]).nonzero().squeeze(-1)
    woven = torch.zeros(len(placed) + len(other), tokens, device=device)
    row = 0
    for flat, matrix in blocks:
        woven[row : row + len(matrix), flat] = matrix.float()
        row += len(matrix)
    woven[torch.arange(row, len(woven), device=device), other] = 1.0
    order = torch.cat((*key, other)).argsort(stable=True)
    return Transform(woven[order].unsqueeze(0), torch.cat((placed, other))[order].unsqueeze(0))


def reduce_films(view: View, become: Callable[[Film], Woven], pictures: bool = True) -> Reduction:
    """Every film of a sample on its own.

    Args:
        view: the sample.
        become: what becomes of one film.
        pictures: reduce still pictures too.
    """
    films = films_of(view, pictures)
    if not films:
        return Keep(torch.arange(len(view.tokens), device=view.tokens.device).unsqueeze(0))
    return weave(len(view.tokens), [film.tokens for film in films], [become(film) for film in films])


def outside_of(tokens: int, films: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Visual tokens of a sample that no film holds (newlines), of ``tokens``, ascending ``[M]``."""
    owned = torch.zeros(tokens, dtype=torch.bool, device=device)
    for film in films:
        owned[film.flatten()] = True
    return (~owned).nonzero().squeeze(-1)


def standing(film: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Sorting keys that put a film's outputs among the other visual tokens, ``[K]``.

    Outputs of a film in one piece keep their own order where it begins; of a film that other tokens (newlines of
    rows) stand in, they go where their places are.

    Args:
        film: numbers of its tokens, ``[F, P]``.
        places: place ``frame * P + p`` of each output, ``[K]``.
    """
    flat = film.flatten()
    alone = int(flat.max() - flat.min()) + 1 == len(flat)
    return flat.min().expand(len(places)) if alone else flat[places]


def windows_of(grid: tuple[int, int], number: int) -> torch.Tensor:
    """Window of each cell of a grid that is cut into ``number * number`` parts as equal as can be, ``[P]``."""
    rows, columns = (torch.arange(size) * number // size for size in grid)
    return (rows.unsqueeze(1) * number + columns).flatten()


def redundant_segments(same: torch.Tensor, longest: int = 1024) -> tuple[list[tuple[int, int]], int]:
    """The segmentation that makes most tokens redundant, by dynamic programming over the last frame (HoliTom).

    A segment saves ``(places static in all of it) * (its frames - 1)`` tokens. Of equally good segmentations the one
    that ends in the shortest segment is taken.

    Args:
        same: places that hardly change from frame ``f`` to ``f + 1``, ``[F - 1, P]`` bool.
        longest: most frames of a segment.

    Returns:
        First and last frame of each segment, and the tokens saved by all of them.
    """
    frames = len(same) + 1
    saved = [same[start:].cumprod(0).sum(1).tolist() for start in range(frames)]
    best, begin = [0], [0]
    for end in range(1, frames):
        best.append(best[end - 1])
        begin.append(end)
        for length in range(2, min(end + 1, longest) + 1):
            start = end - length + 1
            total = (best[start - 1] if start else 0) + saved[start][length - 2] * (length - 1)
            if total > best[end]:
                best[end], begin[end] = total, start
    pieces, end = [], frames - 1
    while end >= 0:
        pieces.append((begin[end], end))
        end = begin[end] - 1
    return pieces[::-1], best[-1]
