"""``zoo fit``: what it writes is what ``zoo run --params`` takes; what it cannot do it says in one line."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from zoo.cli import main
from zoo.fitting import Samples, fit, read_parameters
from zoo.interface import Method, implemented, method_class

TINY = ("-m", "tiny-llava")
FITTING: dict[str, dict[str, Any]] = {
    "adaptinfer": {"share": 0.5, "counts": [5]},
    "attention-debiasing": {"host_parameters": {"keep_ratio": 0.3}},
    "fitprune": {},
    "information-horizon": {"threshold": 0.5},
    "vflowopt": {"calls": 3, "initial": 2},
    "vtw": {"first": 1, "eta": 50.0},
}
"""Methods with something to fit, and options under which a tiny random model has an answer."""


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(3):
        Image.radial_gradient("L").rotate(20 * number).convert("RGB").save(place / f"{number}.png")
    (place / "notes.txt").write_text("no picture")
    return place


def test_every_method_with_a_fit_of_its_own_is_tested_here() -> None:
    visual = (slug for slug in implemented() if method_class(slug).phase == "visual-tokens")
    assert {slug for slug in visual if method_class(slug).fit.__func__ is not Method.fit.__func__} == set(
        FITTING
    )
    for slug in FITTING:
        assert list(inspect.signature(method_class(slug).fit).parameters)[:2] == ["loaded", "samples"]


@pytest.mark.parametrize("slug", FITTING)
def test_what_is_found_can_be_run(slug: str, folder: Path, tmp_path: Path) -> None:
    loaded = zoo.load_model("tiny-llava")
    fitted = fit(slug, loaded, Samples((str(folder),), "Where is it?", limit=2), FITTING[slug])
    assert fitted.fitted_on is not None
    assert fitted.fitted_on.images == [str(folder / "0.png"), str(folder / "1.png")]
    file = tmp_path / "params.json"
    file.write_text(fitted.to_json())
    method = zoo.method(slug, **read_parameters(file, slug))
    assert method != zoo.method(slug)
    (inputs, *_) = Samples((str(folder),)).inputs(loaded, lambda *_: None)
    with method.apply(loaded) as applied, torch.no_grad():
        applied(**inputs)
        assert applied.report.kept < applied.report.total


def test_the_file_goes_from_fit_to_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "vtw.json"
    words = ("--images", str(folder), "-s", "first=1", "-s", "eta=50", "-o", str(file))
    code, out, _ = command(capsys, "fit", "vtw", *TINY, *words)
    assert code == 0
    assert "layer=1" in out
    assert json.loads(file.read_text())["parameters"] == {"layer": 1}
    quick = (*TINY, "--repeats", "1", "-n", "2", "--no-record", "--json")
    _, out, _ = command(capsys, "run", "vtw", *quick, "--params", str(file))
    assert json.loads(out)["parameters"]["layer"] == 1
    _, out, _ = command(capsys, "run", "vtw", *quick, "--params", str(file), "-s", "layer=2")
    assert json.loads(out)["parameters"]["layer"] == 2
    assert read_parameters(file, "divprune+vtw") == {"vtw.layer": 1}


def test_without_a_file_the_result_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "fit", "fitprune", *TINY, "-i", str(folder / "0.png"))
    assert (code, err) == (0, "")
    assert json.loads(out)["parameters"]["fitted_on"] == 36


def test_an_interrupt_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.methods.visual_tokens.vtw.Branches", interrupt)
    file = tmp_path / "vtw.json"
    code, out, _ = command(capsys, "fit", "vtw", *TINY, "-i", str(folder), "-o", str(file))
    assert (code, out) == (130, "")
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "vtv"], "did you mean vtw"),
        (["fit", "divprune", *TINY], "nothing to fit"),
        (["fit", "flap"], "nothing to fit"),
        (["fit", "vtw", "-m", "tiny-llama"], "vision-language"),
        (["fit", "vtw", *TINY, "-s", "etta=1"], "did you mean eta"),
        (["fit", "vtw", *TINY, "-s", "eta=much"], "eta: Input should be a valid number"),
        (["fit", "vtw", *TINY, "-s", "first=1", "-s", "eta=0"], "raise eta"),
        (["fit", "adaptinfer", *TINY, "-s", "layer=1"], "did you mean layers"),
        (["fit", "vflowopt", *TINY, "-s", "calls=1", "-s", "cell=-1"], "cell: Input should be greater"),
        (["fit", "vtw", *TINY, "-i", "{place}/nowhere"], "there is no picture"),
        (["fit", "vtw", *TINY, "-i", "{place}/none"], "no pictures in"),
        (["fit", "vtw", *TINY, "-i", "{place}/none", "-o", "{place}"], "is a folder"),
        (["run", "vtw", *TINY, "--params", "{place}/nowhere.json"], "cannot be read"),
        (["run", "vtw", *TINY, "--params", "{place}/text.json"], "no file of parameters"),
        (["run", "fastv", *TINY, "--params", "{place}/vtw.json"], "parameters of vtw"),
        (["run", "vtw", *TINY, "--params", "{place}/old.json"], "no parameter 'depth'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "vtw.json").write_text('{"method": "vtw", "parameters": {"layer": 2}}')
    (tmp_path / "old.json").write_text('{"method": "vtw", "parameters": {"depth": 2}}')
    code, out, err = command(capsys, *(word.format(place=tmp_path) for word in words))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
