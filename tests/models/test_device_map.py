"""Models that accelerate places: on whatever devices there are, or refused when parts of them would be offloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import NeedsExtra, RunFailed
from zoo.models.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tokenizer = tiny_model("tiny-llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_placed_model_is_the_same_model(folder: Path) -> None:
    pytest.importorskip("accelerate")
    placed = zoo.load_model(folder, device_map="auto", dtype="float32")
    plain = zoo.load_model(folder, device="cpu", dtype="float32")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(placed.model(ids.to(placed.device)).logits.cpu(), plain.model(ids).logits)


def test_what_would_be_offloaded_is_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from zoo.models import loading

    places: Any = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    with pytest.raises(RunFailed, match="does not fit on this machine's devices"):
        loading._build(folder, "big", torch.float32, "sdpa", False, places)


def test_accelerate_is_named_when_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("no accelerate")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", missing)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else real(name, *a)
    )
    with pytest.raises(NeedsExtra, match="efficiency-zoo\\[large\\]"):
        zoo.load_model(folder, device_map="auto")
