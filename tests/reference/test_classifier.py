"""The reference classifier, made of a tiny encoder; and, slowly, the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coloured_pictures import replace_cifar10
from PIL import Image

import zoo
from zoo.bench.session import Arm
from zoo.bench.tasks import Desk, make_task
from zoo.cli import main
from zoo.errors import BadInput
from zoo.models import LoadedModel
from zoo.models.names import KNOWN, KnownModel
from zoo.models.tiny import tiny_model
from zoo.reference import classifier
from zoo.reference.probe import Probe, features

Fitted = Callable[[], Path]


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A tiny encoder and coloured pictures, except for slow tests."""
    if "slow" in request.keywords:
        return

    def encoder() -> LoadedModel:
        return LoadedModel(
            *tiny_model("tiny-dinov2", patch_size=14, image_size=56), ref="encoder", revision="r1"
        )

    monkeypatch.setattr(classifier, "encoder", encoder)
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "home"))
    replace_cifar10(monkeypatch, tmp_path)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A short name for the classifier that was fitted here."""
    classifier.fit(tmp_path / "out", fitted=60, judged=20)
    file = tmp_path / "out" / classifier.TRAINED
    known = KnownModel("mini", "Tiny.", "encoder", licence="MIT", parts=("encoder",), trained=file)
    monkeypatch.setitem(KNOWN, "mini", known)
    return known


def test_fitting_writes_a_head_and_how_it_came_about(tmp_path: Path) -> None:
    record = classifier.fit(tmp_path / "out", fitted=60, judged=20)
    assert json.loads((tmp_path / "out" / classifier.RECORD).read_text()) == json.loads(
        record.model_dump_json()
    )
    assert (record.encoder, record.revision, record.fitted, record.judged) == ("encoder", "r1", 60, 20)
    assert record.accuracy > 0.8, "colours are easy"
    assert record.interval[0] <= record.accuracy <= record.interval[1]
    before = (tmp_path / "out" / classifier.TRAINED).read_bytes()
    with pytest.raises(BadInput, match="name another folder"):
        classifier.fit(tmp_path / "out")
    classifier.fit(tmp_path / "again", fitted=60, judged=20)
    assert (tmp_path / "again" / classifier.TRAINED).read_bytes() == before


def test_the_short_name_loads_transformers_own_classifier(known: KnownModel) -> None:
    loaded = zoo.load_model("mini", device="cpu")
    assert type(loaded.model).__name__ == "Dinov2ForImageClassification"
    assert loaded.model.config.id2label[3] == "cat"
    assert loaded.anatomy.kind == "encoder"
    assert loaded.facts["assembled"] == "encoder"
    wide = Image.new("RGB", (300, 160), "red")
    pixels = loaded.processor(images=[wide], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, classifier.SIDE, classifier.SIDE)
    with torch.no_grad(), zoo.method("tome", r=4).apply(loaded) as applied:
        assert applied(pixel_values=pixels).logits.shape == (1, 10)
    assert applied.report.kept_ratio < 1


def test_its_logits_are_the_probes_scores(known: KnownModel) -> None:
    loaded = zoo.load_model("mini", device="cpu")
    pictures = zoo.image_data.labelled("cifar10", limit=60)
    encoder = classifier.encoder()
    seen = features(encoder, pictures, classifier.SIDE)
    probe = Probe.fit(seen, torch.from_numpy(pictures.labels))
    weight, bias = probe.linear()
    pixels = next(zoo.reference.probe.batches(encoder, pictures, classifier.SIDE))
    with torch.no_grad():
        logits = loaded.model(pixel_values=pixels).logits
    torch.testing.assert_close(logits, (seen[: len(pixels)] @ weight.T + bias).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("content", [b"not safetensors", None])
def test_a_head_that_does_not_fit_leaves_nothing(known: KnownModel, content: bytes | None) -> None:
    assert known.trained is not None
    if content is None:
        classifier.save_file({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, known.trained)
    else:
        known.trained.write_bytes(content)
    with pytest.raises(BadInput, match="does not hold the head"):
        zoo.load_model("mini", device="cpu")
    assert known.folder is not None
    assert [path.name for path in known.folder.parent.iterdir()] == [".lock"]


def test_without_its_head_it_says_how_to_make_one(known: KnownModel) -> None:
    assert known.trained is not None
    known.trained.unlink()
    with pytest.raises(BadInput, match=r"make some with zoo reference train-probe -o DIR"):
        zoo.load_model("mini", device="cpu")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train-probe", "-o", str(tmp_path / "out"), "--pictures", "60", "--judged", "20"]
    with pytest.raises(SystemExit) as end:
        main(["reference", *words])
    assert not end.value.code
    assert "on 20 test pictures; leave-one-out" in capsys.readouterr().out
    assert (tmp_path / "out" / "dinov2-small-cifar10.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.network
def test_the_real_classifier_is_as_good_as_its_record_says() -> None:
    loaded = zoo.load_model("dinov2-small-cifar10", device="cpu")
    trained = KNOWN["dinov2-small-cifar10"].trained
    assert trained is not None
    record = classifier.Record.model_validate_json((trained.parent / classifier.RECORD).read_text())
    task = make_task("image-classification", limit=200)
    tome = zoo.method("tome", r=3)
    accuracy, loyalty = task.run(Arm(loaded), Arm(loaded, [tome]), Desk())
    assert accuracy.dense is not None
    assert accuracy.method is not None
    assert loyalty.method is not None
    assert accuracy.dense.median == pytest.approx(record.accuracy, abs=0.08)
    assert 0.5 < accuracy.method.median < accuracy.dense.median + 0.02
    assert loyalty.method.median > 0.7
