"""Pictures of what visual-token methods keep.

A method is watched during one forward pass (:func:`record`); the result is drawn on the pixels that the encoder was
given (:func:`draw`), so what is seen is exactly what the model saw: crops, tiles and frames included. Patches of
tokens that left are dimmed, those of tokens that stay are outlined, and those merged into another token are tinted,
one colour per group.
"""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch
from PIL import Image

from zoo.drawing import WIDTH, captioned, flow, natural, titled
from zoo.engines.reductions import Join, Merge, Reduction, Transform
from zoo.engines.views import View
from zoo.errors import BadInput, RunFailed
from zoo.families.visual_tokens import AppliedTokens
from zoo.interface import Applied, AppliedStack
from zoo.models.packing import Packed


@dataclass(frozen=True)
class Shown:
    """One picture or video as the encoder got it.

    Attributes:
        packed: how its tokens were made.
        pixels: of every patch, in 0..1, ``[crops, P, 3, p, p]``.
        ordinals: numbers of its tokens among all visual tokens of the sample, ``[n]``.
    """

    packed: Packed
    pixels: torch.Tensor
    ordinals: torch.Tensor


@dataclass(frozen=True)
class Step:
    """What one stage left of a sample.

    Attributes:
        layer: decoder layer in front of which the stage stands; -1 = before the LLM.
        kept: number of visual tokens that stay.
        owner: for each visual token of the sample before any reduction the number of the token that carries it now:
            itself when it stays, another one when it was merged, -1 when it left; ``[total]``.
    """

    layer: int
    kept: int
    owner: torch.Tensor

    @property
    def merged(self) -> int:
        """Tokens that go on as a part of another one."""
        carried = self.owner >= 0
        return int((carried & (self.owner != torch.arange(len(self.owner)))).sum())


@dataclass
class Trace:
    """What happened to the visual tokens of one sample, stage by stage."""

    pictures: list[Shown] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def carriers(reduction: Reduction, tokens: int) -> torch.Tensor:
    """Output token that each of ``tokens`` input tokens becomes or joins, ``[tokens]``; -1 = none.

    Of a dense transformation, which may spread a token over several outputs, the output with the largest weight counts.

    Args:
        reduction: with a batch of one.
        tokens: number of tokens before.
    """
    anchor = reduction.anchor[0].cpu()
    into = torch.full((tokens,), -1)
    if isinstance(reduction, Merge | Join):
        into = reduction.assignment[0].cpu().clone()
    elif isinstance(reduction, Transform) and len(anchor):
        weight, into = reduction.matrix[0].detach().abs().cpu().max(0)
        into = torch.where(weight > 0, into, -1)
    into[anchor] = torch.arange(len(anchor))
    return into


class _Recorder:
    """Notes, sample by sample, what the stages decide."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.traces: dict[int, Trace] = {}

    def __call__(self, view: View, reduction: Reduction) -> None:
        """Called by the reducer at each stage, once per sample."""
        trace = self.traces.setdefault(view.sample, Trace())
        ordinal = view.ordinal.cpu()
        if not trace.steps:  # nothing has left yet: every token of every picture is there
            for image in view.images:
                pixels = image.patch_pixels().float().cpu()
                if pixels.dim() == 6:  # a patch spans several frames; the first one stands for them
                    pixels = pixels[:, :, :, 0]
                pixels = natural(pixels, self.processor, image.video)
                trace.pictures.append(Shown(image.packed, pixels, ordinal[image.tokens.cpu()]))
        into = carriers(reduction, len(ordinal))
        anchor = ordinal[reduction.anchor[0].cpu()]
        moved = torch.full((view.total,), -1)
        stays = into >= 0
        moved[ordinal[stays]] = anchor[into[stays]]
        before = trace.steps[-1].owner.clone() if trace.steps else torch.arange(view.total)
        before[ordinal] = ordinal  # also of tokens that had left and came back
        owner = torch.where(before >= 0, moved[before.clamp(min=0)], -1)
        trace.steps.append(Step(view.layer, reduction.length, owner))


def record(applied: Applied, **inputs: Any) -> list[Trace]:
    """Run one forward pass and say what the stages did to each sample.

    Args:
        applied: a visual-token method at work, or a stack with one.
        inputs: of the model; pixels, not encoded features.

    Returns:
        One trace per sample, in order; without steps for a sample that no stage has touched.

    Raises:
        BadInput: no visual-token method is at work, or the input has no pictures.
    """
    layers = applied.layers if isinstance(applied, AppliedStack) else [applied]
    reducers = [layer.reducer for layer in layers if isinstance(layer, AppliedTokens)]
    if not reducers:
        raise BadInput(f"{applied.method.name} has no visual tokens to draw")
    recorder = _Recorder(applied.loaded.processor)
    try:
        for reducer in reducers:
            reducer.watch = recorder
        with torch.no_grad():
            applied(**inputs)
    finally:
        for reducer in reducers:
            reducer.watch = None
    return [recorder.traces.get(sample, Trace()) for sample in range(len(inputs["input_ids"]))]


# --- drawing --------------------------------------------------------------------------------------------------------

_SIDE, _SMALL = 360, 176
"""Longer side, in pixels, of a picture, and of a thumbnail or one of several frames."""
_KEPT = (255, 210, 63)


@dataclass(frozen=True)
class _Panel:
    """Crops that are drawn as one rectangle, and where each of them stands in it."""

    shown: Shown
    places: dict[int, tuple[int, int]]
    small: bool

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches of one crop."""
        rows, columns = (self.shown.packed.patch_coordinates.max(0).values + 1).tolist()
        return rows, columns

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches of the rectangle."""
        rows, columns = (1 + max(axis) for axis in zip(*self.places.values(), strict=True))
        return rows * self.patches[0], columns * self.patches[1]

    def cells(self, crop: int, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of ``patches`` of a crop."""
        at = self.shown.packed.patch_coordinates.cpu()[patches]
        (row, column), (rows, columns) = self.places[crop], self.patches
        return at[:, 0] + row * rows, at[:, 1] + column * columns

    def picture(self, cell: int) -> np.ndarray[Any, Any]:
        """What the encoder was given, ``[height, width, 3]`` in 0..255, ``cell`` pixels per patch."""
        pixels = self.shown.pixels
        side = pixels.shape[-1]
        canvas = torch.zeros(*self.shape, 3, side, side)
        for crop in self.places:
            canvas[self.cells(crop, torch.arange(pixels.shape[1]))] = pixels[crop]
        flat = canvas.permute(0, 3, 1, 4, 2).reshape(self.shape[0] * side, self.shape[1] * side, 3)
        image = Image.fromarray((flat * 255).round().byte().numpy())
        size = (self.shape[1] * cell, self.shape[0] * cell)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)

    def labels(self, owner: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """For each patch its token, and the token that carries that one now; ``[rows, columns]``, -1 = none.

        Where the model has interpolated, tokens share patches: one that stays goes before one that left.
        """
        packed, ordinals = self.shown.packed, self.shown.ordinals
        token, carrier = torch.full(self.shape, -1), torch.full(self.shape, -1)
        per_crop = len(packed.patch_coordinates)
        patches = packed.patches.cpu()
        mine = owner[ordinals]
        rank = (mine >= 0).long() + (mine == ordinals).long()
        for level in range(3):
            rows, slots = ((rank == level).unsqueeze(1) & (patches >= 0)).nonzero(as_tuple=True)
            chosen = patches[rows, slots]
            for crop in self.places:
                here = chosen.div(per_crop, rounding_mode="floor") == crop
                cells = self.cells(crop, chosen[here] % per_crop)
                token[cells], carrier[cells] = ordinals[rows[here]], mine[rows[here]]
        return token.numpy(), carrier.numpy()

    def inside(self, cell: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the picture itself, without what was added around it, in pixels."""
        height, width = (size * cell for size in self.shape)
        boxes = self.shown.packed.boxes
        if boxes is None:
            return 0, 0, width, height
        lefts, tops, rights, bottoms = zip(*(boxes[crop] for crop in self.places), strict=True)
        edges = []
        for low, high, size in ((min(lefts), max(rights), width), (min(tops), max(bottoms), height)):
            start, stop = (round((edge - low) / (high - low) * size) for edge in (0.0, 1.0))
            edges.append((max(0, start), min(size, stop)))
        return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _panels(shown: Shown) -> list[_Panel]:
    """Frames of a video one by one; else the thumbnail, and the tiles in their places."""
    packed = shown.packed
    thumbnails = {crop for part in packed.parts if part.thumbnail for crop in part.crops}
    tiles = [crop for crop in range(packed.crops) if crop not in thumbnails]
    if packed.video or packed.boxes is None:
        return [_Panel(shown, {crop: (0, 0)}, packed.crops > 1) for crop in range(packed.crops)]
    panels = [_Panel(shown, {crop: (0, 0)}, True) for crop in sorted(thumbnails)]
    if tiles:
        lefts, tops = (sorted({round(packed.boxes[crop][axis], 3) for crop in tiles}) for axis in (0, 1))
        places = {
            crop: (tops.index(round(packed.boxes[crop][1], 3)), lefts.index(round(packed.boxes[crop][0], 3)))
            for crop in tiles
        }
        panels.append(_Panel(shown, places, False))
    return panels


def _paint(panel: _Panel, owner: torch.Tensor | None, small: bool) -> Image.Image:
    """One rectangle; without ``owner`` as the encoder got it."""
    cell = max(3, round((_SMALL if small else _SIDE) / max(panel.shape)))
    picture = panel.picture(cell)
    if owner is not None:
        token, carrier = (label.repeat(cell, 0).repeat(cell, 1) for label in panel.labels(owner))
        tint = _colours(owner)
        grouped = (carrier >= 0) & (tint.sum(-1) > 0)[carrier]
        stays, dropped = (carrier >= 0) & (carrier == token), carrier < 0
        colour = tint[carrier]
        merged = grouped & ~stays
        own = grouped & stays
        grey = picture.mean(-1, keepdims=True)
        picture = np.where(dropped[..., None], 0.28 * grey, picture)
        # Darker than what stays, so that the survivors stand out of a crowd of groups.
        picture = np.where(merged[..., None], 0.35 * grey + 0.3 * colour, picture)
        picture = np.where(own[..., None], 0.7 * picture + 0.3 * colour, picture)
        # Thick lines around a few tokens; around many they would hide the picture.
        edge = stays & _edges(token, 2 if cell >= 12 and stays.mean() < 0.3 else 1)
        picture = np.where(edge[..., None], np.array(_KEPT, dtype=np.float32), picture)
    image = Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))
    return image.crop(panel.inside(cell))


def _colours(owner: torch.Tensor) -> np.ndarray[Any, Any]:
    """Colour of each token that carries others too, by its number, ``[total, 3]``; black = it carries itself alone."""
    sizes = torch.bincount(owner[owner >= 0], minlength=len(owner))
    colours = np.zeros((len(owner), 3), dtype=np.float32)
    for carrier in (sizes > 1).nonzero().squeeze(-1).tolist():
        # Steps of the golden angle: neighbours never have neighbouring hues, and a group keeps its own at all stages.
        hue = 0.618034 * carrier % 1
        colours[carrier] = [255 * part for part in colorsys.hsv_to_rgb(hue, 0.75 - 0.25 * (carrier % 2), 1)]
    return colours


def _edges(token: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    """Pixels that lie within ``width`` of another token's."""
    found = np.zeros(token.shape, dtype=bool)
    for axis in (0, 1):
        for distance in range(-width, width + 1):
            moved = np.roll(token, distance, axis)
            strip: list[slice] = [slice(None), slice(None)]
            strip[axis] = slice(0, distance) if distance >= 0 else slice(distance, None)
            moved[tuple(strip)] = -2  # the rim of the rectangle is an edge too
            found |= moved != token
    return found


def draw(trace: Trace, title: str) -> Image.Image:
    """The picture as the encoder got it, then what each stage left of it, with captions.

    Args:
        trace: of one sample.
        title: what stands above, such as the method and the model.

    Raises:
        BadInput: no stage has seen a picture.
    """
    if not trace.steps or not trace.pictures:
        raise BadInput(f"{title}: no tokens leave, so there is nothing to draw")
    total = len(trace.steps[0].owner)
    cells = [captioned("what the encoder sees", f"{total} visual tokens", _strip(trace, None))]
    for step in trace.steps:
        where = "before the LLM" if step.layer < 0 else f"before layer {step.layer}"
        counts = f"{step.kept} of {total} kept ({step.kept / total:.0%})"
        if step.merged:
            counts += f", {step.merged} merged into them"
        cells.append(captioned(where, counts, _strip(trace, step.owner)))
    body = flow(cells, WIDTH)
    legend = "outlined: kept | dimmed: dropped"
    if any(step.merged for step in trace.steps):
        legend += " | tinted: merged, one colour per group"
    return titled(title, legend, body)


def _strip(trace: Trace, owner: torch.Tensor | None) -> Image.Image:
    """All pictures of the sample side by side."""
    panels = [panel for shown in trace.pictures for panel in _panels(shown)]
    many = len(panels) > 3
    return flow([_paint(panel, owner, panel.small or many) for panel in panels], WIDTH, 4)


def save_picture(image: Image.Image, path: Path) -> Path:
    """Write a PNG file; it appears complete or not at all. Folders on the way are made.

    Raises:
        RunFailed: it cannot be written.
    """
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            part = Path(file.name)
            try:
                file.write(data.getvalue())
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        raise RunFailed(
            f"the overlay could not be written to {path}: {(error.strerror or str(error)).lower()}"
        ) from None
    return path
