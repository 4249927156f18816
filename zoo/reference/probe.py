"""A linear probe: what can be read off an encoder's features with one linear layer, fitted in closed form.

The features of a picture are [CLS] beside the mean patch, which is also what the head of transformers' DINOv2
classifier is given. ``zoo.reference.classifier`` makes such a head of a probe, and ``benchmarks/encoder_quality.py``
judges methods with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import interpolate, one_hot

from zoo.families.encoder_tokens import AppliedEncoder
from zoo.image_data import LabelledImages
from zoo.models import LoadedModel

BATCH = 50
STRENGTHS = tuple(10.0**power for power in range(-1, 5))
"""Ridge strengths to choose from; features have unit variance."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier: ``(x - mean) / scale @ weight + offset``, the largest of ``[N, classes]`` wins.

    Attributes:
        mean, scale: of the features it was fitted to, ``[D]``.
        weight: ``[D, classes]``.
        offset: ``[classes]``.
        strength: of the ridge.
        left_out: accuracy on the pictures it was fitted to, each judged without its own part in the fit.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    offset: torch.Tensor
    strength: float
    left_out: float

    @classmethod
    def fit(cls, features: torch.Tensor, labels: torch.Tensor) -> Probe:
        """Ridge regression on the classes, ``features [N, D]`` (float64), ``labels [N]``.

        The strength is the one with the best leave-one-out accuracy, which needs no second fit: without its own
        sample, the prediction for sample i is ``y_i - (y_i - p_i) / (1 - h_i)``, h being the diagonal of the hat
        matrix.
        """
        mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
        x, y = (features - mean) / scale, one_hot(labels).double()
        offset = y.mean(0)
        left, singular, right = torch.linalg.svd(x, full_matrices=False)
        projected = left.T @ (y - offset)
        found: Probe | None = None
        for strength in STRENGTHS:
            shrunk = singular.square() / (singular.square() + strength)
            leverage = left.square() @ shrunk + 1 / len(x)
            residual = (y - offset - left @ (shrunk[:, None] * projected)) / (1 - leverage[:, None])
            accuracy = float(((y - residual).argmax(1) == labels).double().mean())
            if found is None or accuracy > found.left_out:
                weight = right.T @ ((shrunk / singular)[:, None] * projected)
                found = cls(mean, scale, weight, offset, strength, accuracy)
        assert found is not None
        return found

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Fraction of ``features [N, D]`` whose largest score is that of the label."""
        scores = ((features - self.mean) / self.scale) @ self.weight + self.offset
        return float((scores.argmax(1) == labels).double().mean())

    def linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same scores as one linear layer: weight ``[classes, D]`` and bias ``[classes]``."""
        weight = (self.weight / self.scale[:, None]).T
        return weight, self.offset - weight @ self.mean


def batches(loaded: LoadedModel, pictures: LabelledImages, size: int) -> Iterator[torch.Tensor]:
    """Pictures as the encoder wants them, enlarged to ``size`` pixels: ``[<= BATCH, 3, size, size]``."""
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in (loaded.processor.image_mean, loaded.processor.image_std)
    )
    for start in range(0, len(pictures), BATCH):
        pixels = torch.from_numpy(pictures.images[start : start + BATCH]).permute(0, 3, 1, 2) / 255
        pixels = interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        yield ((pixels - mean) / deviation).to(loaded.device, loaded.dtype)


@torch.no_grad()
def features(
    loaded: LoadedModel,
    pictures: LabelledImages,
    size: int,
    applied: AppliedEncoder | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> torch.Tensor:
    """[CLS] and the mean patch of every picture, ``[N, 2 D]`` in float64, on the CPU.

    Args:
        loaded: an encoder; the head of a classifier takes no part.
        pictures: what it sees.
        size: height and width in pixels, a multiple of the patch size.
        applied: a method at work in it; tokens that stand for several patches then count as many times in the mean.
        progress: called with the pictures done, and of how many.
    """
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    body: Any = encoder.module.base_model  # without the head of a classifier
    rows = []
    for pixels in batches(loaded, pictures, size):
        last = body(pixel_values=pixels).last_hidden_state
        weight = torch.ones(last.shape[:2]) if applied is None else applied.sources.sum(-1)
        weight = weight[:, encoder.prefix :, None].to(last.device)
        mean = (last[:, encoder.prefix :] * weight).sum(1) / weight.sum(1)
        rows.append(torch.cat((last[:, 0], mean), dim=1).double().cpu())
        progress(min(len(rows) * BATCH, len(pictures)), len(pictures))
    return torch.cat(rows)
