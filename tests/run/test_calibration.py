"""Which text a weight method was calibrated on: read from where it is, recorded, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.bench.record import RunRecord
from zoo.bench.settings import Settings
from zoo.data import digest
from zoo.errors import BadInput
from zoo.runner import Request, run

QUICK = Settings(repeats=1, new_tokens=6, windows=2, window=32, prompt=16)
TEXTS = ["a first text of some words, " * 12, "and a second text of other words, " * 12]


def prune(spec: str = "flap", calibration: str | Path | None = None, **more: object) -> RunRecord:
    request = Request(calibration=calibration, calibration_windows=4, store=False, **more)
    return run(spec, "tiny-llama", request, settings=QUICK)


def test_the_text_and_its_digest_are_recorded(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    record = prune(calibration=file)
    assert record.inputs["calibration"] == str(file)
    assert record.inputs["calibration windows"] == [4, 128]
    assert record.inputs["calibration sha256"] == digest(TEXTS)
    packaged = prune()
    assert packaged.inputs["calibration"] == "news, calibration split"
    assert packaged.inputs["calibration sha256"] != record.inputs["calibration sha256"]


def test_another_seed_draws_other_windows() -> None:
    one, same, other = (
        prune(parameters={"sparsity": 0.3}, seed=seed).reports[0].facts["windows sha256"]
        for seed in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("nowhere.txt", "there is no calibration file nowhere.txt"),
        ("hub:name", "write hub:OWNER/NAME"),
    ],
)
def test_text_that_is_not_there(calibration: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        prune(calibration=calibration)
