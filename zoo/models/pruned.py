"""Pruned models on disk and back.

``refit`` gives a model whose layers were cut the configuration that describes it: the plain one of its architecture
when all layers are alike and it has no extra bias, else one of ``modeling_pruned`` with widths per layer. After that
the model is an ordinary transformers model; ``save_pruned`` writes it in one piece or not at all.
"""

from __future__ import annotations

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
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zoo.errors import BadInput, Refused, RunFailed
from zoo.models import LoadedModel, modeling_pruned
from zoo.models.anatomy import Decoder, anatomy_of

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
    )
}

_OWN_FIELDS = ("attention_output_bias", "mlp_down_bias", "per_layer_config")
_REWRITTEN_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version")


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
    """Raise ``Refused`` when a pruned version of ``model`` could not be described to transformers."""
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


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def refit(model: Any) -> None:
    """Give ``model``, whose linear layers were cut, the configuration and class that describe its present widths.

    The description is checked by building it (without storage) and comparing every parameter's shape.

    Raises:
        Refused: the architecture has no class for widths per layer, or no description fits.
    """
    family, decoder = _family_of(model), anatomy_of(model).decoder
    assert decoder is not None
    widths = _widths(decoder)
    fields = {key: value for key, value in model.config.to_dict().items() if key not in _REWRITTEN_FIELDS}
    fields |= {"num_hidden_layers": len(widths), "head_dim": decoder.layers[0].attention.head_dim}
    uniform = all(layer == widths[0] for layer in widths)
    if uniform:
        fields |= widths[0]
    candidates = []
    if uniform:
        plain = {key: value for key, value in fields.items() if key not in _OWN_FIELDS}
        candidates.append((family.config, family.model, plain))
    own = {**fields, "attention_output_bias": False, "mlp_down_bias": False}
    own["per_layer_config"] = dict(enumerate(widths))
    candidates.append((family.pruned_config, family.pruned_model, own))
    for config_class, model_class, values in candidates:
        try:
            config = config_class(**values)
        except (ValueError, StrictDataclassError):
            continue  # e.g. a plain Llama whose heads do not divide its hidden size
        config._attn_implementation = model.config._attn_implementation
        with torch.device("meta"):
            skeleton = model_class(config)
        if _shapes(skeleton) == _shapes(model):
            _adopt(model, model_class, config)
            return
    raise Refused(
        f"the widths of this {type(model).__name__} fit no configuration that transformers could load"
    )


def _adopt(model: Any, model_class: Any, config: Any) -> None:
    old = model.config
    config.name_or_path = old.name_or_path
    model.__class__ = model_class
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


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
        RunFailed: the disk is full, or the place cannot be written; nothing is left behind.
    """
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


def load_pruned(folder: str | Path, **options: Any) -> Any:
    """Load a saved model with transformers, strictly: every tensor must be there and have the width it should have.

    Args:
        folder: as written by ``save_pruned``.
        options: passed on to ``from_pretrained`` (``dtype``, ``attn_implementation`` ...).

    Returns:
        The transformers model, in ``eval`` mode.

    Raises:
        BadInput: tensors are missing, left over, damaged or of another shape.
    """
    register_pruned_architectures()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{folder} does not hold a complete model ({reason}); save it again") from error
    wrong = sorted(
        {*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])}
    )
    if wrong:
        raise BadInput(
            f"{folder}: weights and config.json do not belong together ({wrong[0]} ...); save it again"
        )
    return model.eval()
