"""``load_model``: from a name, a folder or a hub id to a transformers model that is ready to be fed.

Weights come as safetensors or not at all, and no code from a model's folder runs unless it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.errors import BadInput, DownloadFailed, ModelNotFound, NeedsExtra, RunFailed
from zoo.models import LoadedModel
from zoo.models.names import KNOWN, KnownModel, nearest

if TYPE_CHECKING:
    import torch

Source = Literal["hub", "package"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_DTYPES = {
    "float32": ("fp32", "float32", "float"),
    "bfloat16": ("bf16", "bfloat16"),
    "float16": ("fp16", "float16", "half"),
    "float64": ("fp64", "float64", "double"),
}
_OWN_MODELS = {
    "VimModel": "zoo.models.vim",
    "VimForImageClassification": "zoo.models.vim",
    "SegViT": "zoo.models.segvit",
}
"""Model classes of ours, which transformers lacks, and the modules they are in."""
_VISION_HALF = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
"""Image-text models of which the zoo uses the vision encoder."""
_BARS_FROM = 2_000_000_000
"""Bytes of weights from which loading takes long enough for a progress bar."""


@dataclass(frozen=True)
class _Place:
    """A folder with a model, and what is known about where it came from."""

    folder: Path
    revision: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def load_model(
    ref: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "sdpa",
    source: Source | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer, image processor or both.

    A short name (``zoo models`` lists them) is looked for in the local caches, then on the hub, then in a package
    registry, each step only when the one before has failed; ``facts["source"]`` of the result says which it was.
    Packaged weights are converted once and kept apart from the hub's, since the two need not be equal bit by bit.

    Args:
        ref: a short name such as ``smollm2-135m`` or ``tiny-llama``, a folder (of a transformers model, or of a Stable
            Diffusion pipeline), or a hub id ``owner/name`` with an optional ``@revision``. Write ``./name`` for a
            folder that is called like a short name.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ...; by default CUDA when there is a device, else the CPU.
        dtype: ``fp32``, ``bf16``, ``fp16`` or a torch dtype; by default bf16 on CUDA and fp32 elsewhere.
        attention: attention implementation of transformers.
        source: take a short name from the ``hub`` or from its ``package``, and from nowhere else.
        trust_remote_code: let transformers run Python code that comes with the model.
        device_map: let accelerate spread a model that is too large for one device over several, as transformers'
            ``device_map``: ``auto``, ``balanced``, ``sequential``; in place of ``device``.

    Returns:
        The model in eval mode. Tokenizers of decoders pad on the left and have a padding token, so batches can be
        generated as they are.

    Raises:
        ModelNotFound: the reference leads nowhere; the message has the nearest names.
        BadInput: a damaged or incomplete folder, an unknown device, dtype, attention or architecture.
        NeedsExtra: an optional library is missing.
        DownloadFailed: the weights could not be fetched.
        RunFailed: the model does not fit on the device.
    """
    name = str(ref)
    where = _device(device)
    kind = _dtype(dtype, where)
    if source is not None and (name not in KNOWN or KNOWN[name].random):
        raise BadInput(f"a source can only be chosen for short names of real models, not for {name}")
    if name in KNOWN and KNOWN[name].random:
        from zoo.models.tiny import tiny_model

        model, processor = tiny_model(name, attention=attention)
        place = _Place(Path(), "seed 0", {"source": "random"})
    else:
        place = _resolve(name, source, trust_remote_code)
        if (place.folder / "model_index.json").is_file():
            from zoo.models.diffusion import load_text_to_image

            model, processor = load_text_to_image(place.folder, kind)
        else:
            model = _build(place.folder, name, kind, attention, trust_remote_code, device_map)
            processor = _processor(place.folder, name, model, trust_remote_code)
    import torch

    try:
        if getattr(model, "hf_device_map", None) is None:  # else accelerate has put it where it belongs
            model = model.to(device=where, dtype=kind) if kind is not None else model.to(device=where)
    except torch.OutOfMemoryError:
        raise RunFailed(f"{name} does not fit on {where}; take a smaller dtype or --device cpu") from None
    return LoadedModel(model.eval(), processor, ref=name, revision=place.revision, facts=dict(place.facts))


# --- where it is ----------------------------------------------------------------------------------------------


def _resolve(ref: str, source: Source | None, code: bool) -> _Place:
    if source not in (None, "hub", "package"):
        raise BadInput(f"there is no source called '{source}'; there are hub and package")
    if ref in KNOWN:
        return _known(KNOWN[ref], source)
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return _Place(folder, facts={"source": "folder", **_history(folder)})
    if folder.is_file():
        raise BadInput(f"{ref} is a file; give the folder that holds config.json and the safetensors")
    looks_like_path = ref.startswith((".", "/", "~")) or "\\" in ref
    if looks_like_path or not _HUB_ID.fullmatch(ref):
        kind = "folder" if looks_like_path else "model or folder"
        raise ModelNotFound(f"there is no {kind} called '{ref}'; {nearest(ref)}")
    repository, _, revision = ref.partition("@")
    return _from_hub(repository, revision or None, code)


def _known(model: KnownModel, source: Source | None) -> _Place:
    """Local caches, then the hub, then the package; the zoo's own cache first, so that a choice once made stays."""
    if source is not None and getattr(model, source) is None:
        raise BadInput(f"{model.name} has no {source} source")
    facts = {"licence": model.licence}
    if model.parts:
        from zoo.reference.keeping import assembled

        facts |= {"source": "package", "assembled": " + ".join(model.parts), "caveat": model.caveat}
        folder = assembled(model)
        return _Place(folder, f"sha256:{folder.name}", facts)
    if source != "hub" and model.folder is not None and model.folder.is_dir():
        return _packaged(model)
    if source != "package" and model.hub is not None:
        try:
            place = _from_hub(model.hub, None, code=False)
        except (DownloadFailed, ModelNotFound) as error:
            if source == "hub" or model.package is None:
                raise
            _say(f"{model.name}: {error}; taking it from the package {model.package.label} instead")
        else:
            return _Place(place.folder, place.revision, {**place.facts, **facts})
    return _packaged(model)


def _packaged(model: KnownModel) -> _Place:
    from zoo.models.conversion import converted

    assert model.package is not None
    folder = converted(model)
    labels = " + ".join(file.label for file in model.packages)
    facts = {"source": "package", "package": labels, "licence": model.licence}
    if model.caveat:
        facts["caveat"] = model.caveat
    return _Place(folder, f"sha256:{model.package.sha256}", facts)


def _from_hub(repository: str, revision: str | None, code: bool) -> _Place:
    from zoo.models.hub import HubUnreachable, cached_snapshot, fetch_snapshot

    folder = cached_snapshot(repository, revision)
    # A cached snapshot may lack the Python files that were not wanted when it was fetched.
    if folder is None or (code and not any(folder.glob("*.py"))):
        try:
            folder = fetch_snapshot(repository, revision, code=code)
        except HubUnreachable as error:
            raise HubUnreachable(f"{repository} is not in the hub's local cache, and {error}") from None
    return _Place(folder, folder.name, {"source": "hub", "repository": repository})


def _history(folder: Path) -> dict[str, Any]:
    """The record that pruning left in a folder, as ``{"pruning": ...}``; empty for other models."""
    record = folder / "zoo_pruning.json"
    return {"pruning": _json(record)} if record.is_file() else {}


# --- what it is -----------------------------------------------------------------------------------------------


def _build(
    folder: Path, name: str, dtype: Any, attention: str, code: bool, device_map: str | None = None
) -> Any:
    """The transformers model in ``folder``, on the CPU, or where accelerate's ``device_map`` puts it."""
    from safetensors import SafetensorError

    from zoo.models.quiet import quiet_transformers

    _check_folder(folder, name)
    config = _json(folder / "config.json")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    model_class = _model_class(config, code)
    try:
        with quiet_transformers(bars=size >= _BARS_FROM):
            model, info = model_class.from_pretrained(
                folder,
                dtype=dtype if dtype is not None else "auto",
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=code,
                local_files_only=True,
                output_loading_info=True,
                **({} if device_map is None else {"device_map": device_map}),
            )
    except SafetensorError as error:
        raise BadInput(
            f"the weights of {name} are damaged ({_first_line(error)}); fetch or save them again"
        ) from None
    except ImportError as error:
        if device_map is not None and importlib.util.find_spec("accelerate") is None:
            raise NeedsExtra(
                "a device map needs accelerate; install it with: pip install 'efficiency-zoo[large]'"
            ) from None
        raise NeedsExtra(
            f"{name} cannot be loaded with attention '{attention}': {_first_line(error)}"
        ) from None
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{name} cannot be loaded: {_first_line(error)}") from None
    if _history(folder) and info["unexpected_keys"]:
        raise BadInput(
            f"the weights of {name} hold tensors that its config.json has no place for "
            f"({min(info['unexpected_keys'])} ...); save the pruned model again"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RunFailed(
            f"{name} does not fit on this machine's devices together: parts of it would be offloaded, where no method "
            "can reach them; take a smaller dtype"
        )
    # Poolers that were never saved are harmless: nothing in the zoo reads them. Any other gap would be noise.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise BadInput(
            f"the weights of {name} lack {len(missing)} tensors ({missing[0]} ...), which would be left random; "
            "fetch or save them again"
        )
    return model


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{name} has no config.json; give a folder written by save_pretrained")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise BadInput(
            f"{name} has only pickled weights, which can run code when opened; save it as safetensors first"
        )
    raise ModelNotFound(f"{name} has no .safetensors weights; give a folder written by save_pretrained")


def _model_class(config: dict[str, Any], code: bool) -> Any:
    """The class for a ``config.json``: the one it names, the vision half of image-text models, or an auto class."""
    import transformers

    model_type = str(config.get("model_type", ""))
    if model_type.startswith("zoo_"):  # written by our pruner: our own class, never the copy in the folder
        from zoo.models.pruned import register_pruned_architectures

        register_pruned_architectures()
        return transformers.AutoModelForCausalLM
    remote = config.get("auto_map") or {}
    if code and remote:
        causal = "AutoModelForCausalLM" in remote
        return transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    named = _VISION_HALF.get(model_type) or next(iter(config.get("architectures") or ()), None)
    if named in _OWN_MODELS:
        return getattr(importlib.import_module(_OWN_MODELS[named]), named)
    return getattr(transformers, named or "", None) or transformers.AutoModelForCausalLM


def _processor(folder: Path, name: str, model: Any, code: bool) -> Any:
    """Tokenizer, image processor or both, as the model's input asks for; ``None`` when the folder has none."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    from zoo.models.quiet import quiet_transformers

    has_text = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    has_image = any((folder / file).is_file() for file in _IMAGE_FILES)
    sees = hasattr(model.config, "vision_config")
    auto: Any
    if model.main_input_name == "pixel_values":
        auto = AutoImageProcessor if has_image else None
    elif sees and has_image:
        auto = AutoProcessor
    else:
        auto = AutoTokenizer if has_text else None
    if auto is None:
        return None
    try:
        with quiet_transformers():
            processor = auto.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    except ImportError as error:
        raise NeedsExtra(f"the processor of {name} cannot be loaded: {_first_line(error)}") from None
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
        raise BadInput(
            f"the tokenizer or processor of {name} cannot be loaded: {_first_line(error)}"
        ) from None
    tokenizer = getattr(processor, "tokenizer", processor if hasattr(processor, "decode") else None)
    if tokenizer is not None:
        # Decoders go on from the last token; positions of BERT count from the first one.
        tokenizer.padding_side = "right" if model.config.model_type == "bert" else "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return processor


# --- where it goes --------------------------------------------------------------------------------------------


def _device(given: str | torch.device | None) -> torch.device:
    import torch

    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError:
        raise BadInput(f"there is no device called '{given}'; there are cpu, cuda, cuda:0, mps ...") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise BadInput("there is no CUDA device here; use --device cpu")
        if (device.index or 0) >= count:
            raise BadInput(f"there is no device {device}; this machine has cuda:0 to cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("there is no MPS device here; use --device cpu")
    return device


def _dtype(given: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The torch dtype; ``None`` for ``auto``, the one in which the weights are stored."""
    import torch

    if given is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(given, torch.dtype):
        if not given.is_floating_point:
            raise BadInput(f"weights cannot be {given}; choose a floating-point dtype")
        return given
    if given == "auto":
        return None
    for name, spellings in _DTYPES.items():
        if given.lower() in spellings:
            dtype: torch.dtype = getattr(torch, name)
            return dtype
    raise BadInput(f"there is no dtype called '{given}'; there are fp32, bf16, fp16, fp64 and auto")


# --- small things ---------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _say(line: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
