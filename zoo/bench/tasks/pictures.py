"""A task for image classifiers: held-out pictures of a packaged set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from zoo.bench.record import Comparison, Figure, compare
from zoo.bench.tasks import Desk, Task, task
from zoo.errors import BadInput
from zoo.image_data import IMAGE_SETS, labelled

if TYPE_CHECKING:
    from zoo.bench.session import Arm
    from zoo.image_data import LabelledImages
    from zoo.models import LoadedModel

ImageSetName = Literal["cifar10", "mnist", "fashion-mnist"]


def set_of(loaded: LoadedModel) -> ImageSetName | None:
    """The packaged set whose classes, in their order, the model's head tells apart; ``None`` when there is none."""
    names = getattr(loaded.model.config, "id2label", None) or {}
    own = tuple(str(names[number]) for number in sorted(names))
    sets: tuple[ImageSetName, ...] = ("cifar10", "mnist", "fashion-mnist")
    return next((name for name in sets if IMAGE_SETS[name].names == own), None)


@task("image-classification")
class ImageClassification(Task):
    """Fraction of held-out pictures that an image classifier puts into the right class."""

    data: ImageSetName = Field(
        "cifar10", description="A packaged set; the classifier's classes must be its own."
    )
    limit: int = Field(
        500, ge=1, description="Pictures that are shown, as many of each class; always the same ones."
    )
    batch: int = Field(
        25, ge=1, description="Pictures at once; 1 for methods that look at a batch as a whole."
    )

    def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
        """Two comparisons: ``accuracy`` and, with a method, ``loyalty``.

        A method's tokens reach the head as it leaves them: a head that takes their mean takes it over fewer.

        Raises:
            BadInput: the model has no image processor or no head for these classes, or the set has fewer pictures.
            DownloadFailed: the pictures could not be fetched.
        """
        from zoo.bench.scoring import fraction

        if dense.loaded.processor is None:
            raise BadInput(f"{dense.loaded.ref} has no image processor, so it cannot be shown pictures")
        if set_of(dense.loaded) != self.data:
            raise BadInput(
                f"{dense.loaded.ref} has no head for the classes of {self.data}; take a classifier such as "
                "dinov2-small-cifar10"
            )
        pictures = labelled(self.data, "test", self.limit)
        label = f"{self.data}, {len(pictures)} pictures"
        own = desk.answers(self, lambda: self._seen(dense, pictures, desk))
        others = None if method is None else self._seen(method, pictures, desk)

        def accuracy(seen: list[int]) -> Figure:
            return fraction([a == b for a, b in zip(seen, pictures.labels.tolist(), strict=True)])

        rows = [compare("accuracy", accuracy(own), None if others is None else accuracy(others), task=label)]
        if others is not None:
            same = fraction([a == b for a, b in zip(own, others, strict=True)])
            rows.append(compare("loyalty", None, same, task=label))
        return rows

    def _seen(self, arm: Arm, pictures: LabelledImages, desk: Desk) -> list[int]:
        """The class with the highest logit, per picture."""
        import torch

        apart = any(method.card().properties.get("batchable") is False for method in arm.methods)
        at_once = 1 if apart else self.batch
        found: list[int] = []
        with torch.no_grad(), arm.ready() as applied:
            for start in range(0, len(pictures), at_once):
                desk.progress("classifying pictures", start, len(pictures))
                pixels = _pixels(arm.loaded, pictures.images[start : start + at_once])
                found += applied(pixel_values=pixels).logits.argmax(-1).tolist()
        return found


def _pixels(loaded: LoadedModel, images: Any) -> Any:
    """Pictures ``[B, H, W, 3]`` as the model's image processor prepares them: ``[B, 3, H', W']`` on its device."""
    from PIL import Image

    pixels = loaded.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")[
        "pixel_values"
    ]
    return pixels.to(loaded.device, loaded.dtype)
