"""``zoo train`` on pictures: EViT and AS-ViT fine-tune a classifier, DToP a segmenter; resumed and run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.engines.classification import accuracy, classifier
from zoo.engines.segmentation import batch_of as mask_batch
from zoo.engines.segmentation import mask_loss, mean_iou, segmenter
from zoo.engines.training import TrainingInterrupted
from zoo.errors import BadInput, Refused
from zoo.image_data import LabelledImages
from zoo.labelled_pictures import IGNORED, Canvases, LabelledPicture
from zoo.methods.encoder_tokens.evit import EViT, EViTRecipe
from zoo.models import LoadedModel
from zoo.models.segvit import MaskPrediction
from zoo.models.tiny import tiny_model

CLASSES = ("red", "green", "blue")


def coloured(count: int, side: int = 48) -> LabelledImages:
    """Noisy pictures, one channel brighter than its own random tint."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = random.integers(0, 120, (count, side, side, 3)) + random.integers(0, 50, (count, 1, 1, 3))
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 60
    return LabelledImages(images.astype(np.uint8), labels.astype(np.int64), CLASSES)


def pictures(count: int = 60) -> list[LabelledPicture]:
    made = coloured(count)
    return [
        LabelledPicture(Image.fromarray(image), int(label), CLASSES)
        for image, label in zip(made.images, made.labels, strict=True)
    ]


def load(name: str = "tiny-vit") -> LoadedModel:
    model, processor = tiny_model(name)
    return LoadedModel(model, processor, name)


def train(slug: str, model: Any, data: Any, output: Path, parameters: dict[str, Any], **more: Any) -> Any:
    recipe = {"steps": 6, "batch": 8, "learning_rate": 1e-3, **more.pop("recipe", {})}
    return zoo.train(slug, model, data, output=output, parameters=parameters, recipe=recipe, **more)


def test_evit_learns_and_the_result_loads_with_its_classes(tmp_path: Path) -> None:
    dense = load()
    before = {name: value.clone() for name, value in dense.model.state_dict().items()}
    trained = train("evit", dense, pictures(), tmp_path / "out", {"layers": [1, 2], "keep_ratio": 0.5})
    assert trained.record.after["held-out accuracy"] >= 0.9
    assert trained.record.after["tokens kept (mean over blocks)"] < 0.8
    again = zoo.load_model(tmp_path / "out" / "model", device="cpu")
    assert again.model.config.id2label == dict(enumerate(CLASSES))
    changed = [
        name
        for name, value in again.model.vit.state_dict().items()
        if not torch.equal(value, before[f"vit.{name}"])
    ]
    assert len(changed) > 50
    for name, value in dense.model.state_dict().items():
        assert torch.equal(value, before[name]), "the model that was given has changed"


@pytest.mark.parametrize("name", ["tiny-deit", "tiny-dinov2", "tiny-dinov2-registers"])
def test_a_new_head_is_a_linear_probe(name: str) -> None:
    fresh = classifier(load(name), pictures(), lambda *_: None)
    assert accuracy(fresh, pictures(90)[60:]) >= 0.9
    kept = classifier(fresh, pictures(), lambda *_: None)
    assert torch.equal(kept.model.classifier.weight, fresh.model.classifier.weight)
    assert kept.model is not fresh.model


def test_the_keep_ratio_of_a_training_from_scratch_falls() -> None:
    method, recipe = EViT(keep_ratio=0.5), EViTRecipe(batch=10, shrink_start=1, shrink_epochs=2)
    ratios = [method._at(step, recipe, 40).keep_ratio for step in range(16)]
    assert ratios[:4] == [1.0] * 4
    assert ratios[4:12] == sorted(ratios[4:12], reverse=True)
    assert ratios[8] == pytest.approx(0.75)
    assert ratios[12:] == [0.5] * 4
    assert {method._at(step, EViTRecipe(), 40).keep_ratio for step in (0, 5)} == {0.5}


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-dinov2-registers"])
def test_as_vit_meets_its_budget_and_its_thresholds_come_back(name: str, tmp_path: Path) -> None:
    trained = train(
        "as-vit", load(name), pictures(), tmp_path / "out", {"layers": [1, 2, 3], "flops_ratio": 0.7},
        recipe={"steps": 25},
    )  # fmt: skip
    parts = [json.loads(line)["parts"] for line in (tmp_path / "out" / "training.jsonl").open()]
    assert parts[0].keys() == {"cross entropy", "budget", "logits", "features"}
    assert parts[-1]["budget"] < parts[0]["budget"] / 3
    assert (
        trained.record.after["tokens kept (mean over blocks)"]
        < trained.record.before["tokens kept (mean over blocks)"]
    )
    assert trained.record.after["held-out accuracy"] >= 0.9
    again = zoo.load_model(tmp_path / "out" / "model", device="cpu")
    found = again.model.config.as_vit
    assert found["layers"] == [1, 2, 3]
    inputs = again.processor(images=[pictures()[0].picture], return_tensors="pt")
    with zoo.method("as-vit").apply(again) as applied, torch.no_grad():
        applied(**inputs)
        assert applied.tokens_per_block[-1] < applied.tokens_per_block[0]
        assert applied.report.facts["threshold before block 3"] == found["thresholds"][2]


@pytest.mark.parametrize(
    ("slug", "parameters"),
    [
        ("evit", {"layers": [1, 2]}),
        ("as-vit", {"layers": [1, 2, 3]}),
        ("dtop", {"threshold": 0.3}),
    ],
)
def test_a_resumed_training_ends_with_the_same_bits(
    slug: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    data = Canvases(coloured(40), grey=False) if slug == "dtop" else pictures(30)
    whole = train(slug, load(), data, tmp_path / "whole", parameters)

    def stop(step: Any) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        train(slug, load(), data, tmp_path / "parts", parameters, on_step=stop)
    resumed = train(slug, load(), data, tmp_path / "parts", parameters, resume=True)
    mine, theirs = (result.outcome.loaded.model for result in (whole, resumed))
    for name, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert getattr(mine.config, "as_vit", None) == getattr(theirs.config, "as_vit", None)


def test_dtop_makes_a_segmenter_that_runs_with_fewer_tokens(tmp_path: Path) -> None:
    data = Canvases(coloured(120), grey=False)
    dense = train("dtop", load(), data, tmp_path / "dense", {"threshold": 1}, recipe={"steps": 30})
    assert dense.record.after["held-out mIoU"] > 2 * dense.record.before["held-out mIoU"]
    assert dense.record.after["tokens kept (mean over blocks)"] == 1
    short = train("dtop", str(tmp_path / "dense" / "model"), data, tmp_path / "short", {"threshold": 0.3})
    assert short.record.after["tokens kept (mean over blocks)"] < 0.9
    again = zoo.load_model(tmp_path / "short" / "model", device="cpu")
    assert again.model.config.id2label[0] == "background"
    record = zoo.run("dtop", again, parameters={"threshold": 0.3}, store=False)
    assert record.reports[0].kept_ratio < 1


def test_perfect_masks_cost_next_to_nothing_and_ignored_pixels_nothing() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.long)
    masks[:, :, 4:] = 2
    logits = torch.full((1, 3, 8, 8), -20.0)
    logits[0, 0, :, :4] = logits[0, 2, :, 4:] = 20.0
    classes = torch.tensor([[[9.0, -9.0], [-9.0, 9.0], [9.0, -9.0]]])
    right = mask_loss(MaskPrediction(classes, logits.flatten(2)), (8, 8), masks)
    assert all(float(value) < 1e-3 for value in right.values())
    wrong = mask_loss(MaskPrediction(-classes, -logits.flatten(2)), (8, 8), masks)
    assert all(float(value) > 0.5 for value in wrong.values())
    masks[:, :2] = IGNORED
    logits[:, :, :2] = -logits[:, :, :2]
    again = mask_loss(MaskPrediction(classes, logits.flatten(2)), (8, 8), masks)
    assert float(again["focal"]) < 1e-3
    assert float(again["dice"]) < 1e-3


def test_mean_iou_of_a_perfect_and_of_a_constant_answer() -> None:
    loaded = segmenter(load(), ("background", *CLASSES), None)
    batch = mask_batch(loaded, (48, 48), [Canvases(coloured(30), grey=False)[0]])
    truth = torch.nn.functional.one_hot(batch.masks, 4).movedim(-1, 1).float()

    class Fixed:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

        def __call__(self, **_: Any) -> Fixed:
            return self

    assert mean_iou(Fixed(truth), [batch], 4) == 1
    everywhere = torch.zeros_like(truth)
    everywhere[:, 0] = 1
    present = len(batch.masks.unique())
    share = float((batch.masks == 0).float().mean())
    assert mean_iou(Fixed(everywhere), [batch], 4) == pytest.approx(share / present, abs=1e-6)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no classifier"):
        train("evit", load("tiny-clip"), pictures(), tmp_path / "a", {"layers": [1]})
    with pytest.raises(Refused, match="on its own"):
        train("evit", load("tiny-llava"), pictures(), tmp_path / "b", {"layers": [1], "restore": True})
    with pytest.raises(Refused, match="other classes"):
        train("dtop", load("tiny-segvit"), Canvases(coloured(30), grey=False), tmp_path / "c", {})
    with pytest.raises(BadInput, match="no folder"):
        train("evit", "tiny-vit", str(tmp_path / "nowhere"), tmp_path / "d", {"layers": [1]})
    assert not any((tmp_path / name).exists() for name in "abcd")
