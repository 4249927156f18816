"""Segmenting pictures: batches, losses of mask heads, intersection over union, and a SegViT made of an encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from zoo.errors import BadInput, Refused
from zoo.labelled_pictures import IGNORED, MaskedPicture
from zoo.models import LoadedModel
from zoo.models.segvit import BACKBONES, MaskPrediction, SegViT, SegViTConfig, enlarged

CLASS_WEIGHT, FOCAL_WEIGHT, DICE_WEIGHT = 1.0, 20.0, 1.0
ABSENT_WEIGHT = 0.1
ALPHA, GAMMA = 0.25, 2.0


@dataclass(frozen=True)
class MaskBatch:
    """``pixels [B, 3, H, W]`` and the class of each of them, ``masks [B, H, W]`` (int64, ``IGNORED`` = none)."""

    pixels: torch.Tensor
    masks: torch.Tensor


def batch_of(loaded: LoadedModel, size: tuple[int, int], examples: Sequence[MaskedPicture]) -> MaskBatch:
    """Pictures and masks, both stretched to ``size`` (height, width): nothing is cropped."""
    height, width = size
    pictures = [example.picture.resize((width, height)) for example in examples]
    pixels = loaded.processor(images=pictures, do_resize=False, do_center_crop=False, return_tensors="pt")[
        "pixel_values"
    ]
    masks = [
        np.asarray(Image.fromarray(example.mask).resize((width, height), Image.Resampling.NEAREST))
        for example in examples
    ]
    labels = torch.from_numpy(np.stack(masks).astype(np.int64))
    return MaskBatch(pixels.to(loaded.device, loaded.dtype), labels.to(loaded.device))


def segmenter(loaded: LoadedModel, classes: Sequence[str], exits: Sequence[int] | None) -> LoadedModel:
    """A copy of a SegViT for these classes, or a new SegViT on a copy of an encoder, with heads that know nothing.

    The heads are half as wide as the encoder, with three layers and attention heads of 64 channels.

    Raises:
        BadInput: the model has no image processor, or the exits do not fit.
        Refused: the model is another segmenter, or an encoder that SegViT does not stand on.
    """
    model, names = loaded.model, dict(enumerate(classes))
    if loaded.processor is None:
        raise BadInput(f"{loaded.ref} has no image processor, so it cannot be trained on pictures")
    if isinstance(model, SegViT):
        if model.config.id2label != names:
            raise Refused(
                f"{loaded.ref} segments other classes than those of the data; begin with its encoder"
            )
        return LoadedModel(copy.deepcopy(model), loaded.processor, loaded.ref, loaded.revision)
    if model.config.model_type not in BACKBONES:
        raise Refused(f"SegViT stands on one of {', '.join(BACKBONES)}, not on {loaded.anatomy.description}")
    depth, width = model.config.num_hidden_layers, model.config.hidden_size // 2
    config = SegViTConfig(
        backbone=model.config.to_dict(),
        exits=exits or sorted({depth // 2 - 1, 2 * depth // 3 - 1, depth - 1}),
        head_size=width,
        head_heads=width // 64 if width % 64 == 0 else 1,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        attn_implementation=model.config._attn_implementation,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SegViT(config).to(loaded.device, loaded.dtype).eval()
    made.backbone.load_state_dict(model.base_model.state_dict(), strict=False)
    return LoadedModel(made, loaded.processor, loaded.ref, loaded.revision)


def mask_loss(
    prediction: MaskPrediction, grid: tuple[int, int], masks: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Losses of one head, means over the batch, by name. Each class has the query of its number.

    Args:
        prediction: masks ``[B, K, h w]``.
        grid: ``(h, w)``.
        masks: class of each pixel, ``[B, H, W]``.

    Returns:
        ``classes``: is a class in the picture? ``focal`` and ``dice``: where, for those that are; all weighted.
    """
    count = prediction.masks.shape[1]
    truth = masks.unsqueeze(1) == torch.arange(count, device=masks.device)[:, None, None]
    present = truth.flatten(2).any(-1)
    weight = prediction.classes.new_tensor([1.0, ABSENT_WEIGHT])
    classes = functional.cross_entropy(prediction.classes.flatten(0, 1), (~present).long().flatten(), weight)
    known = (masks != IGNORED).unsqueeze(1).expand_as(truth)[present].flatten(1).float()
    size = (masks.shape[-2], masks.shape[-1])
    logits = enlarged(prediction.masks.unflatten(-1, grid), size)[present].flatten(1)
    target = truth[present].flatten(1).to(logits.dtype)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    chance = logits.sigmoid()
    wrong = chance + target - 2 * chance * target
    side = ALPHA * target + (1 - ALPHA) * (1 - target)
    pixels = known.sum(1).clamp(min=1)
    focal = (side * wrong**GAMMA * entropy * known).sum(1) / pixels
    overlap, area = (chance * target * known).sum(1), ((chance + target) * known).sum(1)
    dice = 1 - (2 * overlap + 1) / (area + 1)
    return {
        "classes": CLASS_WEIGHT * classes,
        "focal": FOCAL_WEIGHT * focal.mean(),
        "dice": DICE_WEIGHT * dice.mean(),
    }


@torch.no_grad()
def mean_iou(model: Any, batches: Sequence[MaskBatch], classes: int) -> float:
    """Intersection over union of all pixels of the batches, mean over the classes that occur or are predicted."""
    both, either = torch.zeros(classes), torch.zeros(classes)
    for batch in batches:
        said, known = model(pixel_values=batch.pixels).logits.argmax(1), batch.masks != IGNORED
        for number in range(classes):
            one, other = (said == number) & known, (batch.masks == number) & known
            both[number] += (one & other).sum().cpu()
            either[number] += (one | other).sum().cpu()
    occurs = either > 0
    return float((both[occurs] / either[occurs]).mean())
