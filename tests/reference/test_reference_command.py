"""``zoo reference`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zoo.cli import main
from zoo.models import LoadedModel
from zoo.reference import assembly

Zoo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def zoo(capsys: pytest.CaptureFixture[str]) -> Zoo:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["reference", *words])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, assembled: tuple[Any, Any]) -> None:
    """What ``load_model`` gives, whatever it is asked for."""
    monkeypatch.setattr("zoo.models.loading.load_model", lambda *_, **__: LoadedModel(*assembled))


def test_a_canvas_with_its_questions(zoo: Zoo, tmp_path: Path) -> None:
    code, out, _ = zoo("canvas", "4", "-o", str(tmp_path / "canvas.png"))
    assert code == 0
    assert Image.open(tmp_path / "canvas.png").size == (112, 112)
    assert "existence: Is there a" in out
    code, _, err = zoo("canvas", "4", "-o", str(tmp_path / "nowhere" / "canvas.png"))
    assert code == 1
    assert "no such file" in err


def test_examining(zoo: Zoo, model: None) -> None:
    code, out, err = zoo("eval", "-n", "2", "-a", "existence", "--json")
    assert code == 0, err
    (grade,) = json.loads(out)["abilities"].values()
    assert grade["questions"] == 2
    assert grade["displaced"] is not None
    code, out, err = zoo(
        "eval", "-n", "2", "-a", "compare", "--method", "divprune", "--set", "keep_ratio=0.5"
    )
    assert code == 0, err
    assert "loyalty" in out
    assert "displaced" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-a", "juggling"), "there is no ability called 'juggling'"),
        (("--set", "keep_ratio=0.5"), "name it with --method"),
        (("--method", "flip", "-n", "2"), "there is no method called 'flip'"),
    ],
)
def test_what_cannot_be_examined(zoo: Zoo, model: None, words: tuple[str, ...], said: str) -> None:
    code, _, err = zoo("eval", *words)
    assert code == 2
    assert said in err


def test_training(
    zoo: Zoo,
    parts: Callable[[], tuple[LoadedModel, LoadedModel]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(assembly, "parts", parts)
    words = ("train", "-o", str(tmp_path / "out"), "--words", "1", "--steps", "1", "--settling", "1")
    code, out, err = zoo(*words, "--batch", "1", "--device", "cpu")
    assert code == 0, err
    assert "answers 1/1  loss" in err
    assert "settling: 1 steps, 1 canvases" in out
    assert (tmp_path / "out" / "reference-vlm.safetensors").is_file()
    code, _, err = zoo(*words)
    assert code == 2
    assert "is finished" in err
