"""Smaller models on disk: what is written, how it loads again in a new process, what is never left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, decoder_of, ids, logits, padded
from torch import nn

from zoo import load_model
from zoo.engines.slicing import fold_norms, new_linear, slice_ends, slice_layer
from zoo.engines.surgery import Block
from zoo.errors import BadInput, RunFailed
from zoo.families.layer_removal import LayerRemover
from zoo.families.weights import Facts, WeightMethod, Work
from zoo.methods.weights.cfsp import Cfsp
from zoo.methods.weights.flap import Flap

ROOT = Path(__file__).parents[2]
FLAP = Flap(sparsity=0.4)


class Remove(LayerRemover):
    """Removes the blocks it is given."""

    slug = "remove"
    blocks: tuple[Block, ...]

    def choose(self, work: Work) -> tuple[Block, ...]:
        return self.blocks


class Slice(WeightMethod):
    """Keeps 40 of 48 channels of the residual stream in random bases, all of them behind the last layer."""

    slug = "slice"

    def transform(self, work: Work) -> Facts:
        generator = work.generator()
        fold_norms(work.decoder, work.model)
        layers = work.decoder.layers
        entering, middle = (
            [torch.linalg.qr(torch.randn(48, 48, generator=generator))[0][:, :40] for _ in layers]
            for _ in range(2)
        )
        last = torch.linalg.qr(torch.randn(48, 48, generator=generator))[0]
        for layer, *bases in zip(layers, entering, middle, [*entering[1:], last], strict=True):
            slice_layer(layer, *bases)
        slice_ends(work.decoder, work.model, entering[0], last)
        return {}


class Narrow(WeightMethod):
    """Keeps the first 36 of 48 channels of the residual stream, everywhere."""

    slug = "narrow"

    def transform(self, work: Work) -> Facts:
        model, decoder = work.model, work.decoder
        for layer in decoder.layers:
            for name, parts in layer.by_input.items():
                for part in parts:
                    linear = part.linear
                    cut = linear.weight[:36] if name in ("output", "down") else linear.weight[:, :36]
                    setattr(part.owner, part.name, new_linear(cut, linear, linear.bias))
        for norm in (decoder.norm, *(n for x in decoder.layers for n in (x.input_norm, x.post_norm))):
            norm.weight = nn.Parameter(norm.weight[:36].detach().clone())
        decoder.embed.weight = nn.Parameter(decoder.embed.weight[:, :36].detach().clone())
        decoder.embed.embedding_dim = 36
        model.lm_head.weight = decoder.embed.weight
        return {}


HALVES = Remove(blocks=(Block(0, "attention"), Block(1, "mlp")))
SAVED: dict[str, tuple[str, torch.dtype, WeightMethod]] = {
    "llama-gqa": ("llama-gqa", torch.float32, FLAP),
    "llama-bias": ("llama-bias", torch.float32, FLAP),
    "mistral": ("mistral", torch.float32, FLAP),
    "qwen2": ("qwen2", torch.bfloat16, FLAP),
    "qwen3": ("qwen3", torch.float32, Cfsp(sparsity=0.2, slope=20.0)),
    "gemma3": ("gemma3", torch.float32, FLAP),
    "phi3": ("phi3", torch.bfloat16, FLAP),
    "halves-llama": ("llama-gqa", torch.float32, HALVES),
    "halves-mistral-window": ("mistral-window", torch.float32, HALVES),
    "halves-gemma3": ("gemma3", torch.bfloat16, HALVES),
    "halves-phi3": ("phi3", torch.float32, HALVES),
    "sliced-qwen2": ("qwen2", torch.float32, Slice()),
    "sliced-phi3": ("phi3", torch.float32, Slice()),
    "alike": ("llama-gqa", torch.float32, Cfsp(ffn_sparsity=0.4, round_to=16, slope=0.0)),
    "alike-fewer-layers": ("qwen2-window", torch.float32, Remove(blocks=(Block(1),))),
    "alike-fewer-layers-gemma3": ("gemma3", torch.float32, Remove(blocks=(Block(0),))),
    "alike-narrow": ("llama-gqa", torch.float32, Narrow()),
}
"""Those called alike have layers of one shape, which a plain configuration describes."""

RELOAD = """
import sys, torch
torch.set_num_threads(1)
root, how, *names = sys.argv[1:]
inputs, out = torch.load(root + "/inputs.pt"), {}
for name in names:
    if how == "zoo":
        from zoo import load_model
        model = load_model(root + "/" + name, device="cpu", dtype="auto").model
    else:
        from transformers import AutoModelForCausalLM
        sys.modules["zoo"] = sys.modules["taxonomy"] = None  # as where our package is not installed
        model = AutoModelForCausalLM.from_pretrained(root + "/" + name, trust_remote_code=not name.startswith("alike"))
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        out[name] = {"logits": model(**inputs).logits, "ids": generated, "module": type(model).__module__}
torch.save(out, root + "/" + how + ".pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """Saved models, what they were, and what two new processes (one without our package) make of them."""
    root = tmp_path_factory.mktemp("saved")
    applied = {
        name: method.apply(build(model, dtype), calibration=ids())
        for name, (model, dtype, method) in SAVED.items()
    }
    for name, pruned in applied.items():
        assert pruned.save(root / name) == root / name
    torch.save(padded(), root / "inputs.pt")
    found = {}
    for how in ("zoo", "transformers"):
        environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
        if how == "zoo":
            environment["PYTHONPATH"] = str(ROOT)
        command = [
            sys.executable,
            *(["-P"] if sys.version_info >= (3, 11) else []),
            "-c",
            RELOAD,
            str(root),
            how,
        ]
        subprocess.run([*command, *SAVED], check=True, cwd=root, env=environment)
        found[how] = torch.load(root / f"{how}.pt")
    return root, applied, found


@pytest.mark.parametrize("how", ["zoo", "transformers"])
@pytest.mark.parametrize("name", SAVED)
def test_save_and_reload_in_a_new_process(name: str, how: str, saved: Any) -> None:
    root, applied, found = saved
    mask = padded()["attention_mask"].bool()
    assert torch.equal(found[how][name]["logits"][mask], logits(applied[name], **padded()))
    generated = applied[name].generate(**padded(), max_new_tokens=5, do_sample=False)
    assert torch.equal(found[how][name]["ids"], generated)
    record = json.loads((root / name / "zoo_pruning.json").read_text())
    assert record["method"] == applied[name].method.slug
    assert record["report"]["kept"] == applied[name].report.kept
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_alike_layers_need_no_code(saved: Any) -> None:
    root, applied, found = saved
    for name, (model, *_) in SAVED.items():
        alike = name.startswith("alike")
        assert alike != (root / name / "modeling_pruned.py").is_file()
        config = json.loads((root / name / "config.json").read_text())
        assert alike != config["model_type"].startswith("zoo_"), name
        if alike:
            assert found["transformers"][name]["module"].startswith("transformers.models")
            assert type(applied[name].model) is type(build(model).model)
    config = json.loads((root / "alike" / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 48)
    assert json.loads((root / "alike-narrow" / "config.json").read_text())["hidden_size"] == 36
    fewer = json.loads((root / "alike-fewer-layers" / "config.json").read_text())
    assert (fewer["num_hidden_layers"], fewer["layer_types"]) == (2, ["full_attention", "sliding_attention"])
    gemma = json.loads((root / "alike-fewer-layers-gemma3" / "config.json").read_text())
    assert gemma["layer_types"] == ["full_attention", "sliding_attention"]


def test_a_reloaded_model_has_an_anatomy_and_can_be_pruned_again(tmp_path: Path) -> None:
    applied = Flap(sparsity=0.3).apply(build("llama-gqa"), calibration=ids())
    loaded = load_model(applied.save(tmp_path / "pruned"), device="cpu")
    assert decoder_of(loaded).prunable_parameters() == applied.report.kept
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    again = Flap(sparsity=0.2).apply(loaded, calibration=ids())
    assert again.report.kept < applied.report.kept
    assert load_model(again.save(tmp_path / "again")).model.config.num_hidden_layers == 3


@pytest.mark.parametrize("method", [FLAP, HALVES, Slice()], ids=["flap", "halves", "slice"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "phi3"])
def test_static_cache_and_other_attention(name: str, method: WeightMethod) -> None:
    if (name, method.slug) == ("gemma3", "slice"):
        pytest.skip("its residual stream cannot be rotated")
    applied = method.apply(build(name), calibration=ids())
    plain = applied.generate(**padded(), max_new_tokens=5, do_sample=False)
    static = applied.generate(**padded(), max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, static)
    expected = logits(applied, **padded())
    applied.model.set_attn_implementation("eager")  # must reach the layers
    torch.testing.assert_close(logits(applied, **padded()), expected, rtol=0, atol=1e-4)
    attention = decoder_of(applied.loaded).layers[-1].attention.module
    assert attention.config._attn_implementation == "eager"


def test_the_target_must_be_free(tmp_path: Path) -> None:
    applied = Flap(sparsity=0.3).apply(build("llama-gqa"), calibration=ids())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(BadInput, match="not empty"):
        applied.save(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "do not lose me"
    (tmp_path / "empty").mkdir()
    applied.save(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    applied = Flap(sparsity=0.3).apply(build("llama-gqa"), calibration=ids())

    def fail(folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(applied.model, "save_pretrained", fail, raising=False)
    with pytest.raises(RunFailed if isinstance(error, OSError) else KeyboardInterrupt):
        applied.save(tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the writer meets a real error halfway."""
    resource = pytest.importorskip("resource")
    applied = FLAP.apply(build("llama-gqa"), calibration=ids())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(RunFailed, match="could not be written"):
            applied.save(tmp_path / "pruned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bias", "lack 1 tensors"),
        ("left over", "no place for"),
        ("width", "cannot be loaded"),
        ("cut", "are damaged"),
    ],
)
def test_a_damaged_folder_is_never_loaded_silently(damage: str, message: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Flap(sparsity=0.3).apply(build("llama-gqa"), calibration=ids()).save(tmp_path / "pruned")
    path = folder / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        weights = load_file(path)
        if damage == "bias":
            weights.pop(next(key for key in weights if key.endswith("down_proj.bias")))
        elif damage == "left over":
            weights["model.layers.9.mlp.down_proj.bias"] = torch.zeros(48)
        else:
            key = next(key for key in weights if key.endswith("up_proj.weight"))
            weights[key] = weights[key][:-1].contiguous()
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=message):
        load_model(folder, device="cpu")
