"""Where a measurement was taken: hardware, versions, commit. Secrets and personal names are not collected."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import zoo

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


def environment(device: str, attention: str | None = None) -> dict[str, Any]:
    """Facts about this machine and process, as JSON values.

    Args:
        device: where the model ran (``cpu``, ``cuda:0``).
        attention: the model's attention implementation (``sdpa`` ...).

    ``hardware`` is the one-line name by which results are grouped: the GPU when the model ran on one, else the
    processor with its number of usable cores.
    """
    import torch

    cpu = cpu_name()
    cores = usable_cores()
    gpu = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None
    return {
        "hardware": gpu or f"{cpu}, {cores} cores",
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "ram_gb": ram_gb(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {"efficiency-zoo": zoo.__version__, **{name: _version(name) for name in _PACKAGES}},
        "commit": commit(),
        "attention": attention,
        "clock": "CUDA events" if gpu else "processor time, one thread",
    }


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown processor"


def usable_cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def ram_gb() -> float | None:
    """Main memory in 10^9 bytes; ``None`` where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` when files differ; ``None`` outside of one."""
    root = Path(zoo.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
