from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zoo.models.conversion import _RECIPES
from zoo.models.names import KNOWN, known_models, nearest
from zoo.models.tiny import _BUILDERS


def test_every_tiny_name_can_be_built_and_every_recipe_exists() -> None:
    assert {model.name for model in known_models() if model.random} == set(_BUILDERS)
    for model in known_models():
        if model.recipe is not None:
            assert model.recipe[0] in _RECIPES


def test_real_models_state_licence_size_and_digest() -> None:
    real = [model for model in known_models() if not model.random]
    assert {model.name for model in real} == {
        "smollm2-135m",
        "stories15m",
        "tinyllama-1.1b",
        "dinov2-small-saliency",
        "minilm",
        "reference-vlm",
        "dinov2-small-cifar10",
    }
    for model in real:
        assert model.licence
        assert model.megabytes > 0
        if model.parts:
            assert all(KNOWN[name].package is not None for name in model.parts)
            assert model.trained is not None
            continue
        assert model.packages
        for package in model.packages:
            assert len(bytes.fromhex(package.sha256)) == 32
        assert model.draft is None or KNOWN[model.draft].kind == "decoder"
    assert "4-bit" in KNOWN["smollm2-135m"].caveat
    assert "saliency" in KNOWN["dinov2-small-saliency"].caveat


def test_cached_follows_the_cache(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = KNOWN["smollm2-135m"]
    assert not model.cached
    assert KNOWN["tiny-llama"].cached
    assert model.folder is not None
    assert home in model.folder.parents
    model.folder.mkdir(parents=True)
    assert model.cached


def test_typos_meet_the_nearest_name() -> None:
    assert "smollm2-135m" in nearest("SmolLM-135M")
    assert nearest("zzz") == "zoo models lists the short names"


def test_listing_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom zoo.models.names import known_models\n"
        "print([model.cached for model in known_models()].count(True))\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'onnx'} & set(sys.modules)))"
    )
    environment = {"ZOO_HOME": str(tmp_path), "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split("\n")[:2] == [str(len(_BUILDERS)), "[]"]
