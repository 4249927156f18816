"""Stretches of a video: neighbouring frames that belong together, and what stands still in them."""

from __future__ import annotations

from itertools import groupby

import torch

from zoo.engines.selection import unit_rows


def static_places(x: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the frames of ``x [W, P, D]`` at each place, over all pairs of frames, ``[P]``.

    Minus infinity for a single frame, in which nothing can be static.
    """
    count = len(x)
    if count == 1:
        return torch.full((x.shape[1],), -float("inf"), device=x.device)
    unit = unit_rows(x.flatten(0, 1)).view(x.shape)
    # The sum of all cosines, those of a frame with itself included, is the squared length of the summed units.
    return (unit.sum(0).square().sum(-1) - count) / (count * (count - 1))


def contiguous(labels: list[int]) -> list[int]:
    """Cluster labels of frames, refined so that every label is one stretch.

    A label keeps its longest run, the first of equals, if that has two frames or more. Runs left over join, from left
    to right, the longer of the stretches beside them as they then are (the left one of equals); with none beside, 0.
    """
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(length for own, length in runs if own == label) for label in labels}
    refined: list[int] = []
    for label, length in runs:
        stays = longest[label] == length > 1
        if stays:
            longest[label] = 0  # later runs of the same length are left over
        refined += [label if stays else -1] * length
    start = 0
    for label, run in groupby(tuple(refined)):
        stop = start + len(list(run))
        if label < 0:
            left, right = _first_run(refined[:start][::-1]), _first_run(refined[stop:])
            joined = refined[start - 1 if left >= right else stop] if left or right else 0
            refined[start:stop] = [joined] * (stop - start)
        start = stop
    return refined


def _first_run(labels: list[int]) -> int:
    return next((len(list(run)) for _, run in groupby(labels)), 0)
