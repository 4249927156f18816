"""Classifying held-out pictures: by the task, and as part of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coloured_pictures import replace_cifar10
from PIL import Image

import zoo
from zoo.bench.session import Arm
from zoo.bench.settings import Settings
from zoo.bench.tasks import Desk, make_task
from zoo.bench.tasks.pictures import set_of
from zoo.errors import BadInput, DownloadFailed
from zoo.image_data import IMAGE_SETS, labelled
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model
from zoo.runner import run


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_cifar10(monkeypatch, tmp_path)


@pytest.fixture
def classifier() -> LoadedModel:
    """A ViT that has not learnt anything, but knows what the classes are called."""
    model, processor = tiny_model("tiny-vit")
    model.config.id2label = dict(enumerate(IMAGE_SETS["cifar10"].names))
    return LoadedModel(model, processor)


def test_accuracy_and_loyalty_are_those_of_single_pictures(classifier: LoadedModel) -> None:
    method = zoo.method("evit", keep_ratio=0.3, layers=[0, 1])
    task = make_task("image-classification", limit=30, batch=7)
    accuracy, loyalty = task.run(Arm(classifier), Arm(classifier, [method]), Desk())
    shown = labelled("cifar10", "test", 30)

    def seen(model: Any) -> list[int]:
        found = []
        for image in shown.images:
            pixels = classifier.processor(images=[Image.fromarray(image)], return_tensors="pt")
            with torch.no_grad():
                found.append(int(model(**pixels).logits.argmax()))
        return found

    own = seen(classifier.model)
    with method.apply(classifier) as applied:
        others = seen(applied)
    assert accuracy.task == "cifar10, 30 pictures"
    assert accuracy.dense is not None
    assert accuracy.method is not None
    assert loyalty.method is not None
    assert accuracy.dense.items == "".join(
        "01"[a == b] for a, b in zip(own, shown.labels.tolist(), strict=True)
    )
    assert accuracy.method.items == "".join(
        "01"[a == b] for a, b in zip(others, shown.labels.tolist(), strict=True)
    )
    assert loyalty.method.items == "".join("01"[a == b] for a, b in zip(own, others, strict=True))


def test_the_dense_model_answers_once(classifier: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    task, desk = make_task("image-classification", limit=10), Desk()
    (first,) = task.run(Arm(classifier), None, desk)
    monkeypatch.setattr(classifier.model, "forward", None)
    (second,) = task.run(Arm(classifier), None, desk)
    assert first == second


def test_methods_that_look_at_a_whole_batch_are_shown_one_picture_at_a_time(classifier: LoadedModel) -> None:
    at_once: list[int] = []
    classifier.model.register_forward_pre_hook(
        lambda _, __, given: at_once.append(len(given["pixel_values"])), with_kwargs=True
    )
    task = make_task("image-classification", limit=10, batch=5)
    task.run(Arm(classifier), Arm(classifier, [zoo.method("as-vit", layers=[1, 2])]), Desk())
    assert at_once == [5, 5, *[1] * 10]


def test_models_without_a_head_for_these_classes_are_refused(classifier: LoadedModel) -> None:
    assert set_of(classifier) == "cifar10"
    bare = zoo.load_model("tiny-dinov2", device="cpu")
    assert set_of(bare) is None
    with pytest.raises(BadInput, match="no head for the classes of cifar10"):
        make_task("image-classification").run(Arm(bare), None, Desk())
    with pytest.raises(BadInput, match="no head for the classes of mnist"):
        make_task("image-classification", data="mnist").run(Arm(classifier), None, Desk())
    blind = LoadedModel(classifier.model, None)
    with pytest.raises(BadInput, match="no image processor"):
        make_task("image-classification").run(Arm(blind), None, Desk())


@pytest.mark.parametrize("offline", [False, True])
def test_a_run_on_a_classifier_tells_its_accuracy(
    classifier: LoadedModel, monkeypatch: pytest.MonkeyPatch, offline: bool, tmp_path: Path
) -> None:
    monkeypatch.setattr("zoo.bench.scenarios.encoder_tokens.SHOWN", 20)
    if offline:

        def fail(file: object) -> Path:
            raise DownloadFailed("no network")

        monkeypatch.setattr("zoo.image_data.fetch", fail)
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(photo)
    record = run(
        "tome", classifier, images=(str(photo),), settings=Settings(repeats=1, seconds=0.1), store=False
    )
    found = {row.quantity: row.task for row in record.comparisons}
    assert "image-time" in found
    if offline:
        assert "accuracy" not in found
        assert any("no network" in note for note in record.notes)
    else:
        assert found["accuracy"] == found["loyalty"] == "cifar10, 20 pictures"
