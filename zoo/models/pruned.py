"""Pruned models on disk and back.

``refit`` gives a model whose layers were cut the configuration that describes it: the plain one of its architecture
when all layers are alike and it has no extra bias, else one of ``modeling_pruned`` with widths per layer. After that
the model is an ordinary transformers model; ``save_pruned`` writes it in one piece or not at all.
"""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zoo.errors import BadInput, Refused, RunFailed
from zoo.models import LoadedModel, modeling_pruned
from zoo.models.anatomy import Decoder, anatomy_of
from zoo.models.modeling_pruned import BlockWrapped, set_heads

RECORD = "zoo_pruning.json"
"""What was done: method, parameters, report, and the model it was done to."""


@dataclass(frozen=True)
class _Family:
    config: Any
    model: Any
    pruned_config: Any
    pruned_model: Any


_FAMILIES = {
    name: _Family(
        config,
        model,
        getattr(modeling_pruned, f"Pruned{config.__name__}"),
        getattr(modeling_pruned, f"Pruned{model.__name__}"),
    )
    for name, config, model in (
        ("llama", LlamaConfig, LlamaForCausalLM),
        ("mistral", MistralConfig, MistralForCausalLM),
        ("qwen2", Qwen2Config, Qwen2ForCausalLM),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM),
        ("gemma3_text", Gemma3TextConfig, Gemma3ForCausalLM),
        ("phi3", Phi3Config, Phi3ForCausalLM),
    )
}

_OWN_FIELDS = (
    "attention_output_bias",
    "mlp_down_bias",
    "per_layer_config",
    "original_hidden_size",
    "output_size",
    "wrapper_block",
)
_REWRITTEN_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "kv_sharing_modes")


def register_pruned_architectures() -> None:
    """Let transformers' auto classes load pruned models in this process, running no code from their folders."""
    for family in _FAMILIES.values():
        AutoConfig.register(family.pruned_config.model_type, family.pruned_config, exist_ok=True)
        AutoModelForCausalLM.register(family.pruned_config, family.pruned_model, exist_ok=True)


def _family_of(model: Any) -> _Family:
    family = _FAMILIES.get(model.config.model_type.removeprefix("zoo_"))
    if family is None or not isinstance(model, family.model):
        raise Refused(
            f"a pruned {type(model).__name__} could not be saved and loaded again; models that can: "
            + ", ".join(known.model.__name__ for known in _FAMILIES.values())
        )
    return family


def check_prunable(model: Any) -> None:
    """Raise ``Refused`` when a pruned version of ``model`` could not be described to transformers.

    The decoder of a vision-language model may be pruned all the same: saving it is another matter.
    """
    if anatomy_of(model).kind != "vlm":
        _family_of(model)


def _widths(decoder: Decoder) -> list[dict[str, int | bool]]:
    """Per layer, the configuration fields that pruning changes."""
    return [
        {
            "num_attention_heads": layer.attention.heads,
            "num_key_value_heads": layer.attention.kv_heads,
            "intermediate_size": layer.mlp.width,
            "attention_output_bias": layer.attention.output.bias is not None,
            "mlp_down_bias": layer.mlp.down.bias is not None,
        }
        for layer in decoder.layers
    ]


def _wrapper_block(decoder: Decoder) -> int | None:
    """Width of the blocks of wrapped linear layers; ``None`` when they are plain."""
    linears = [part.linear for layer in decoder.layers for part in layer.linears]
    return next((one.left.shape[-1] for one in linears if isinstance(one, BlockWrapped)), None)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def refit(model: Any) -> None:
    """Give ``model``, whose linear layers were cut, the configuration and class that describe its present widths.

    The description is checked by building it (without storage) and comparing every parameter's shape. A decoder inside
    a vision-language model has only the plain description; where that does not fit, the model works but
    ``save_pruned`` refuses it.

    Raises:
        Refused: the architecture has no class for widths per layer, or no description fits.
    """
    kind = anatomy_of(model).kind
    if kind == "vlm":
        _refit_inside(model)
        return
    if kind == "embedding":  # weights of text encoders become zero, none of them is cut
        return
    family, decoder = _family_of(model), anatomy_of(model).decoder
    assert decoder is not None
    widths, uniform, fields = _description(decoder)
    candidates = [(family.config, family.model, _plain(fields))] if uniform else []
    own = {**fields, "attention_output_bias": False, "mlp_down_bias": False}
    own["per_layer_config"] = dict(enumerate(widths))
    candidates.append((family.pruned_config, family.pruned_model, own))
    for config_class, model_class, values in candidates:
        try:
            config = config_class(**values)
        except (ValueError, StrictDataclassError):
            continue  # e.g. a plain Llama whose heads do not divide its hidden size
        config._attn_implementation = model.config._attn_implementation
        if _fits(model, model_class, config):
            config.name_or_path = model.config.name_or_path
            model.__class__ = model_class
            _adopt(model, decoder, config)
            return
    raise Refused(
        f"the widths of this {type(model).__name__} fit no configuration that transformers could load"
    )


def _refit_inside(model: Any) -> None:
    decoder = anatomy_of(model).decoder
    assert decoder is not None
    _, uniform, fields = _description(decoder)
    if not uniform:
        return
    try:
        config = type(decoder.config)(**_plain(fields))
    except (ValueError, StrictDataclassError):
        return
    whole = copy.deepcopy(model.config)
    whole.text_config = config
    config._attn_implementation = decoder.config._attn_implementation
    if _fits(model, type(model), whole):
        model.config.text_config = config
        _adopt(decoder.module, decoder, config)


def _description(decoder: Decoder) -> tuple[list[dict[str, int | bool]], bool, dict[str, Any]]:
    """Widths per layer, whether they are alike, and the fields of a configuration (with the widths, if alike)."""
    widths = _widths(decoder)
    fields = {key: value for key, value in decoder.config.to_dict().items() if key not in _REWRITTEN_FIELDS}
    fields |= {
        "num_hidden_layers": len(widths),
        "head_dim": decoder.layers[0].attention.head_dim,
        "hidden_size": decoder.hidden_size,
        "wrapper_block": _wrapper_block(decoder),
    }
    uniform = all(layer == widths[0] for layer in widths) and decoder.layers[0].attention_shortcut is None
    return widths, uniform, fields | (widths[0] if uniform else {})


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a configuration of transformers has itself."""
    return {key: value for key, value in fields.items() if key not in _OWN_FIELDS}


def _fits(model: Any, model_class: Any, config: Any) -> bool:
    """Whether ``model_class`` built from ``config`` has the parameters of ``model``, by name and shape."""
    with torch.device("meta"):
        return _shapes(model_class(config)) == _shapes(model)


def _adopt(owner: nn.Module, decoder: Decoder, config: Any) -> None:
    """Let all modules of ``owner`` that shared the decoder's configuration share ``config``."""
    old = decoder.config
    for module in owner.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    for layer in decoder.layers:
        if layer.attention.heads:
            set_heads(layer.attention.module, layer.attention.heads, layer.attention.kv_heads, config)


def save_pruned(loaded: LoadedModel, folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write model, tokenizer and ``record`` to a new folder, all of it or nothing.

    Everything goes to a hidden folder beside the target, which is renamed when complete. The model loads again with
    ``zoo.load_model(folder)``, or with plain transformers: ``AutoModelForCausalLM.from_pretrained(folder)`` when its
    layers are alike, with ``trust_remote_code=True`` otherwise (a copy of ``modeling_pruned.py`` is in the folder).
    ``AutoTokenizer`` then wants the same flag: transformers reads the model's configuration to find a tokenizer.

    Args:
        loaded: a model that ``refit`` has been given.
        folder: a place that is empty or does not exist yet.
        record: JSON values to keep as ``zoo_pruning.json``.

    Returns:
        The folder, absolute.

    Raises:
        BadInput: the folder holds something already.
        Refused: no configuration of transformers describes the model (a vision-language model with widths per layer).
        RunFailed: the disk is full, or the place cannot be written; nothing is left behind.
    """
    if not _fits(loaded.model, type(loaded.model), loaded.model.config):
        raise Refused(
            f"a {type(loaded.model).__name__} whose decoder layers differ in width cannot be saved: transformers has "
            "no description of it; use it in memory, or prune all layers alike"
        )
    target = Path(folder).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInput(f"{target} exists already and is not empty; choose another folder or remove it first")
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        loaded.model.save_pretrained(staging, safe_serialization=True)
        if loaded.processor is not None:
            loaded.processor.save_pretrained(staging)
        _add_code(loaded.model, staging)
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        staging.replace(target)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"the model could not be written to {target}, so nothing was: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _add_code(model: Any, folder: Path) -> None:
    """For a model with widths per layer: its source, and the lines of ``config.json`` that lead to it."""
    if type(model).__module__ != modeling_pruned.__name__:
        return
    source = Path(str(modeling_pruned.__file__))
    shutil.copyfile(source, folder / source.name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": f"{source.stem}.{type(model.config).__name__}",
        "AutoModelForCausalLM": f"{source.stem}.{type(model).__name__}",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
