"""``zoo train`` on the command line: the whole way, interruption and resuming, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.cli import main

pytest.importorskip("peft")
Zoo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def zoo(capsys: pytest.CaptureFixture[str]) -> Zoo:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} green bottles hanging on the wall, {n} of them" for n in range(40)))
    data = tmp_path / "data.jsonl"
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(3, 23)]
    data.write_text("\n".join(map(json.dumps, rows)))
    common = [
        "train",
        "cfsp",
        "-m",
        "tiny-llama",
        "-d",
        str(data),
        "--calibration",
        str(text),
        "-s",
        "sparsity=0.15",
    ]
    recipe = ["--steps", "4", "--lr", "0.01", "--batch", "2", "--recipe", "accumulate=1", "--length", "64"]
    return [*common, *recipe, "-o", str(tmp_path / "out")]


def test_the_whole_way(zoo: Zoo, words: list[str], tmp_path: Path) -> None:
    code, out, err = zoo(*words)
    assert code == 0, err
    assert "step 4/4  loss" in err
    assert "18 examples, 2 held out" in out
    assert "held-out perplexity" in out
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    code, _, err = zoo(*words)
    assert code == 2
    assert err.startswith("error: the training in ")
    assert err.count("\n") == 1


def test_interrupted_and_resumed(
    zoo: Zoo, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.engines import training

    real = training._advance

    def interrupted(state: Any) -> Any:
        if state.done == 2:
            raise KeyboardInterrupt
        return real(state)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_advance", interrupted)
        code, _, err = zoo(*words)
    assert code == 130
    assert "2 of 4 steps are kept" in err
    assert "--resume goes on" in err
    code, out, err = zoo(*words, "--resume", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["steps"] == 4
    assert record["method"] == "cfsp"
    assert len((tmp_path / "out" / "training.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["train", "prompt-lookup", "-o", "x"], "prompt-lookup has nothing to train; zoo train works with"),
        (["train", "cfps", "-o", "x"], "did you mean cfsp"),
        (["train", "cfsp", "-o", "x", "-d", "nowhere.jsonl"], "there are no texts called 'nowhere.jsonl'"),
        (["train", "cfsp", "-o", "x", "--recipe", "speed=3"], "a recipe has no field 'speed'; it has steps"),
        (["train", "cfsp", "-o", "x", "--lr=-1"], "recipe: learning_rate"),
        (["train", "cfsp", "-o", "x", "-m", "tiny-vit"], "cfsp needs a decoder LLM"),
    ],
)
def test_refusals_are_one_line(
    zoo: Zoo,
    words: list[str],
    change: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "-d" not in change:
        change = [*change, "-d", words[words.index("-d") + 1]]
    code, _, err = zoo(*change)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not Path("x").exists()
