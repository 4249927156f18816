"""The reference classifier: the packaged encoder and one fitted linear layer, as transformers' own classifier.

``dinov2-small-saliency`` sees (unchanged, 112 pixels, 64 patches); a linear layer on [CLS] beside the mean patch tells
the ten classes of CIFAR-10 apart. The layer is a ridge regression (``zoo.reference.probe``), so fitting it again gives
the same layer up to rounding.

A method that drops or merges tokens changes the mean patch: the head takes the plain mean of the tokens that are left.
Where merged ones should count as many times as the patches they hold, methods have ``restore``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.image_utils import SizeDict

from zoo.bench.environment import environment
from zoo.bench.scoring import interval
from zoo.bench.session import Arm
from zoo.bench.tasks import Desk
from zoo.bench.tasks.pictures import ImageClassification
from zoo.errors import BadInput, RunFailed
from zoo.image_data import IMAGE_SETS, labelled
from zoo.models import LoadedModel
from zoo.reference.probe import Probe, features

ENCODER, DATA = "dinov2-small-saliency", "cifar10"
SIDE = 112
FITTED, JUDGED = 5000, 1000
NAME = "dinov2-small-cifar10"
TRAINED, RECORD = f"{NAME}.safetensors", f"{NAME}.json"


class Record(BaseModel):
    """How the head came about, kept beside it."""

    encoder: str
    revision: str = Field(description="Of the encoder's weights.")
    data: str
    side: int = Field(description="Height and width of the pictures, in pixels.")
    fitted: int = Field(description="Training pictures that the head was fitted to.")
    strength: float = Field(description="Of the ridge, on features of unit variance.")
    left_out: float = Field(description="Leave-one-out accuracy on them.")
    judged: int = Field(description="Test pictures that the finished classifier was shown.")
    accuracy: float = Field(description="On those.")
    interval: tuple[float, float] = Field(description="95%, bootstrap over pictures.")
    finished: str
    environment: dict[str, Any]


def encoder() -> LoadedModel:
    """The packaged encoder, float32, on the CPU."""
    from zoo.models.loading import load_model

    return load_model(ENCODER, device="cpu", dtype="fp32", source="package")


def assemble(backbone: LoadedModel, weight: torch.Tensor, bias: torch.Tensor) -> tuple[Any, Any]:
    """Model and image processor.

    Args:
        backbone: a DINOv2 of width D without a head.
        weight, bias: ``[10, 2 D]`` and ``[10]``, on [CLS] beside the mean patch.

    Returns:
        ``Dinov2ForImageClassification`` and a processor that makes pictures of ``SIDE`` pixels; they share no storage
        with what is given.

    Raises:
        RuntimeError: the head is of another shape.
    """
    from transformers import Dinov2ForImageClassification

    names = dict(enumerate(IMAGE_SETS[DATA].names))
    config = copy.deepcopy(backbone.model.config)
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    with torch.random.fork_rng(devices=[]):
        model = Dinov2ForImageClassification(config).eval()
    model.dinov2.load_state_dict(backbone.model.state_dict(), strict=True)
    model.classifier.load_state_dict({"weight": weight, "bias": bias}, strict=True)
    processor = copy.deepcopy(backbone.processor)
    processor.size = SizeDict(shortest_edge=SIDE)
    processor.crop_size = SizeDict(height=SIDE, width=SIDE)
    return model, processor


def put_together(trained: Path) -> tuple[Any, Any]:
    """The classifier with the head in ``trained``.

    Raises:
        BadInput: the file is missing, damaged or of another model.
        DownloadFailed: the encoder could not be fetched.
    """
    backbone = encoder()
    try:
        head = load_file(trained)
        return assemble(backbone, head["weight"], head["bias"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{trained} does not hold the head of the reference classifier: {reason}") from None


def fit(
    output: str | Path,
    *,
    fitted: int = FITTED,
    judged: int = JUDGED,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Record:
    """Fit the head and judge the classifier with it.

    Args:
        output: a folder; the head will be ``dinov2-small-cifar10.safetensors`` in it, its record beside it.
        fitted: training pictures of CIFAR-10 to fit it to.
        judged: test pictures to judge it on, prepared by the classifier's own image processor.
        progress: called with what is done, finished and total pictures.

    Raises:
        BadInput: ``output`` holds a head already, or there are fewer pictures.
        DownloadFailed: encoder or pictures could not be fetched.
        RunFailed: ``output`` cannot be written.
    """
    folder = Path(output).expanduser().absolute()
    if (folder / TRAINED).exists():
        raise BadInput(f"there is a head in {folder} already; name another folder")
    with _written_to(folder):  # before the work, not after it
        folder.mkdir(parents=True, exist_ok=True)
    task = ImageClassification(data=DATA, limit=judged)
    learnt = labelled(DATA, "train", fitted)
    backbone = encoder()

    def tell(done: int, total: int) -> None:
        progress("looking at the training pictures", done, total)

    probe = Probe.fit(features(backbone, learnt, SIDE, progress=tell), torch.from_numpy(learnt.labels))
    weight, bias = (part.float().contiguous() for part in probe.linear())
    model, processor = assemble(backbone, weight, bias)
    (found,) = task.run(Arm(LoadedModel(model, processor, ref=NAME)), None, Desk(progress=progress))
    assert found.dense is not None
    assert found.dense.items is not None
    low, high = interval([float(item) for item in found.dense.items])
    record = Record(
        encoder=backbone.ref,
        revision=str(backbone.revision),
        data=DATA,
        side=SIDE,
        fitted=len(learnt),
        strength=probe.strength,
        left_out=probe.left_out,
        judged=found.dense.n,
        accuracy=found.dense.median,
        interval=(low, high),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment("cpu", model.config._attn_implementation),
    )
    with _written_to(folder):
        (folder / RECORD).write_text(f"{record.model_dump_json(indent=2)}\n", encoding="utf-8")
        save_file({"weight": weight, "bias": bias}, folder / TRAINED)
    return record


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    """What the system says about ``folder``, in one sentence."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunFailed(f"the head could not be written to {folder}: {reason}") from None
