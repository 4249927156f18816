"""How DToP learns (2308.01045, section 4): the usual losses at all heads, while sure tokens leave.

With ``threshold=1`` nothing leaves: that is the dense training that the paper begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from zoo.engines.classification import evenly, input_size
from zoo.engines.segmentation import MaskBatch, batch_of, mask_loss, mean_iou, segmenter
from zoo.engines.training import Group, Loss, Task
from zoo.families.encoder_fine_tuning import TrainedEncoder
from zoo.models import LoadedModel
from zoo.training import Lesson, Setting

if TYPE_CHECKING:
    from zoo.methods.encoder_tokens.dtop import DToP

MEASURED = 64
"""Held-out pictures that are segmented before and after a training, at most."""
HEAD_RATE = 10.0
"""Heads learn so much faster than the encoder."""


def lesson(
    method: DToP, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
) -> Lesson:
    """Everything of the segmenter learns; gradients reach it through the tokens that are left at each exit."""
    student = segmenter(loaded, examples[0].classes, method.exit_blocks)
    model = student.model
    collate = partial(batch_of, student, input_size(student))
    measured = [collate([example]) for example in evenly(heldout, MEASURED)]

    def loss(batch: MaskBatch, step: int) -> Loss:
        applied = method.learning(student)
        with applied:
            model(pixel_values=batch.pixels)
        parts: dict[str, Any] = {}
        for prediction in applied.said:
            for name, value in mask_loss(prediction, model.grid(batch.pixels), batch.masks).items():
                parts[name] = parts.get(name, 0) + value * len(batch.pixels)
        return Loss(sum(parts.values()), len(batch.pixels), parts)

    def measure() -> dict[str, float]:
        classes, kept = model.config.num_labels, []
        with method.apply(student) as applied:
            for batch in measured:
                model(pixel_values=batch.pixels)
                kept.append(applied.report.kept_ratio)
            short = mean_iou(model, measured, classes)
        return {
            "held-out mIoU": short,
            "held-out mIoU without the method": mean_iou(model, measured, classes),
            "tokens kept (mean over blocks)": sum(kept) / len(kept),
        }

    groups = [
        Group({f"backbone.{name}": value for name, value in model.backbone.named_parameters()}),
        Group({f"heads.{name}": value for name, value in model.heads.named_parameters()}, rate=HEAD_RATE),
    ]
    task = Task(groups, examples, collate, loss, model, unit="pictures")
    return Lesson(task, lambda: TrainedEncoder(student), measure)
