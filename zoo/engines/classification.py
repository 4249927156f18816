"""Classifying pictures: batches, accuracy, and an encoder with a head for given classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from zoo.errors import BadInput, Refused
from zoo.labelled_pictures import LabelledPicture
from zoo.models import LoadedModel

PROBED = 1024
"""Pictures that a linear probe is fitted to, at most."""
SHRINKAGE = 0.01
"""Weight decay of the probe, on features of deviation 1."""
_AT_ONCE = 16
_CLASSIFIERS = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
}


@dataclass(frozen=True)
class Batch:
    """``pixels [B, 3, H, W]`` and ``labels [B]`` (int64)."""

    pixels: torch.Tensor
    labels: torch.Tensor


def batch_of(loaded: LoadedModel, examples: Sequence[LabelledPicture]) -> Batch:
    """Pictures as the model's image processor prepares them, on its device."""
    pixels = loaded.processor(images=[example.picture for example in examples], return_tensors="pt")[
        "pixel_values"
    ]
    labels = torch.tensor([example.label for example in examples])
    return Batch(pixels.to(loaded.device, loaded.dtype), labels.to(loaded.device))


def input_size(loaded: LoadedModel) -> tuple[int, int]:
    """Height and width of the pixels that the model's image processor makes of a square picture."""
    blank = loaded.processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    return blank.shape[-2], blank.shape[-1]


def evenly(examples: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` examples from all over a sequence."""
    stride = -(-len(examples) // count)
    return [examples[place] for place in range(0, len(examples), max(1, stride))]


@torch.no_grad()
def accuracy(
    loaded: LoadedModel,
    examples: Sequence[LabelledPicture],
    at_once: int = _AT_ONCE,
    after: Callable[[], None] = lambda: None,
) -> float:
    """Share of the examples whose class gets the highest logit; ``after`` is called behind every batch."""
    right = 0
    for first in range(0, len(examples), at_once):
        batch = batch_of(loaded, examples[first : first + at_once])
        right += int((loaded.model(pixel_values=batch.pixels).logits.argmax(-1) == batch.labels).sum())
        after()
    return right / len(examples)


def classifier(
    loaded: LoadedModel, examples: Sequence[LabelledPicture], progress: Callable[[str, int, int], None]
) -> LoadedModel:
    """A copy of an encoder with a head for the classes of ``examples``.

    A model whose head is for these classes keeps it. Any other gets a new head, a linear probe: logistic regression
    on what the encoder says about up to ``PROBED`` examples, so that fine-tuning does not start from noise.

    Raises:
        BadInput: the model has no image processor.
        Refused: transformers has no classifier on this encoder.
    """
    import transformers

    kind = loaded.model.config.model_type
    if kind not in _CLASSIFIERS:
        raise Refused(
            f"transformers has no classifier to train on {loaded.anatomy.description}; take one of "
            f"{', '.join(_CLASSIFIERS)}"
        )
    if loaded.processor is None:
        raise BadInput(f"{loaded.ref} has no image processor, so it cannot be trained on pictures")
    names = dict(enumerate(examples[0].classes))
    own = getattr(transformers, _CLASSIFIERS[kind])
    if isinstance(loaded.model, own) and loaded.model.config.id2label == names:
        return LoadedModel(copy.deepcopy(loaded.model), loaded.processor, loaded.ref, loaded.revision)
    config = copy.deepcopy(loaded.model.config)
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    with torch.random.fork_rng(devices=[]):
        model = own(config).to(loaded.device, loaded.dtype).eval()
    model.base_model.load_state_dict(loaded.model.base_model.state_dict(), strict=False)
    fresh = LoadedModel(model, loaded.processor, loaded.ref, loaded.revision)
    _probe(fresh, evenly(examples, PROBED), progress)
    return fresh


@torch.no_grad()
def _probe(
    loaded: LoadedModel, examples: Sequence[LabelledPicture], progress: Callable[[str, int, int], None]
) -> None:
    """Fit the head to what it is given for the examples."""
    head: nn.Linear = loaded.model.classifier
    features: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    labels = []
    try:
        for first in range(0, len(examples), _AT_ONCE):
            progress("fitting a linear probe", first, len(examples))
            batch = batch_of(loaded, examples[first : first + _AT_ONCE])
            loaded.model(pixel_values=batch.pixels)
            labels.append(batch.labels)
    finally:
        hook.remove()
    x, y = torch.cat(features).double(), torch.cat(labels)
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    weight, bias = _logistic_regression((x - mean) / spread, y, head.out_features)
    head.weight.copy_(weight / spread)
    head.bias.copy_(bias - (weight / spread) @ mean)


def _logistic_regression(x: torch.Tensor, y: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[classes, D]`` and biases ``[classes]`` for features ``x [M, D]`` of mean 0 and deviation 1."""
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y) + SHRINKAGE / 2 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
