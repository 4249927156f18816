"""Fine-tuning of an image classifier while a method shortens its sequence.

``zoo train METHOD --model M --data D`` gives a classifier that ``zoo run METHOD --model DIR/model`` runs as it was
trained. The papers' augmentation of pictures is left out: they are shown as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from zoo.engines.classification import Batch, accuracy, batch_of, classifier, evenly
from zoo.engines.training import Group, Loss, Task
from zoo.families.encoder_tokens import EncoderTokenReducer
from zoo.interface import refuse
from zoo.labelled_pictures import labelled_pictures
from zoo.models import LoadedModel
from zoo.models.saving import save_model
from zoo.training import Lesson, Setting, Trainable

MEASURED = 256
"""Held-out pictures that are classified before and after a training, at most."""


@dataclass(frozen=True)
class FineTuning:
    """What a method makes of a classifier that it may change.

    Attributes:
        groups: what learns.
        loss: of a batch in a step.
        method: as it has been trained so far, for measuring.
        finish: called once, before the classifier is saved.
    """

    groups: Sequence[Group]
    loss: Callable[[Batch, int], Loss]
    method: Callable[[], EncoderTokenReducer]
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class TrainedEncoder:
    """A classifier that learnt with a shortened sequence."""

    loaded: LoadedModel

    def save(self, folder: str | Path) -> Path:
        """Write model and image processor to a new folder: all or nothing."""
        return save_model(self.loaded, folder)


class EncoderFineTuning(EncoderTokenReducer, Trainable):
    """Base of encoder methods whose paper fine-tunes the whole classifier."""

    data: ClassVar[str] = "cifar10"

    @classmethod
    def read(cls, ref: str | Path) -> Sequence[Any]:
        """Labelled pictures, see ``zoo.labelled_pictures``."""
        return labelled_pictures(ref)

    @abstractmethod
    def fine_tuning(self, student: LoadedModel, setting: Setting, examples: int) -> FineTuning:
        """Everything that learns of ``student``, from so many ``examples``."""

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Copy the model, give it a head for these classes, let everything learn.

        Raises:
            BadInput: the model has no image processor.
            Refused: it is no plain encoder, or one that transformers has no classifier for.
        """
        if loaded.anatomy.kind != "encoder":
            raise refuse(self, "a vision encoder on its own to train", loaded.anatomy.description)
        student = classifier(loaded, examples, setting.progress)
        measured = evenly(heldout, MEASURED)
        tuning = self.fine_tuning(student, setting, len(examples))
        # One picture at a time where the pictures of a batch would depend on each other.
        at_once = 16 if self.card().properties["batchable"] else 1

        def measure() -> dict[str, float]:
            kept: list[float] = []
            with tuning.method().apply(student) as applied:
                short = accuracy(student, measured, at_once, lambda: kept.append(applied.report.kept_ratio))
            return {
                "held-out accuracy": short,
                "held-out accuracy without the method": accuracy(student, measured),
                "tokens kept (mean over blocks)": sum(kept) / len(kept),
            }

        def finish() -> TrainedEncoder:
            tuning.finish()
            return TrainedEncoder(student)

        task = Task(
            groups=tuning.groups,
            examples=examples,
            collate=partial(batch_of, student),
            loss=tuning.loss,
            module=student.model,
            unit="pictures",
        )
        return Lesson(task, finish, measure)


def backbone_groups(model: Any) -> list[Group]:
    """All parameters of a classifier; vectors, special tokens and position embeddings without weight decay."""
    decayed: dict[str, nn.Parameter] = {}
    free: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.dim() > 1 and "position_embedding" not in name and not name.endswith("_token")
        (decayed if plain else free)[name] = parameter
    return [Group(decayed), Group(free, weight_decay=0.0)]
