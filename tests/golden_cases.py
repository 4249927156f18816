"""How golden cases find the code that must reproduce them.

A case is an ``.npz`` file with inputs and outputs of a method's official code. An adapter
(``tests/adapters/<slug>.py``) feeds the inputs to the very functions that ``zoo run`` uses and compares. A case is
recognised by the arrays it holds, never by its file name, so further cases can be dropped into a folder named by
``ZOO_GOLDEN`` (layout ``<slug>/<case>.npz``).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

OWN = Path(__file__).parent / "golden"
ADAPTERS = Path(__file__).parent / "adapters"


class Case:
    """The arrays of one golden case, as tensors or plain Python values."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.arrays: dict[str, np.ndarray] = {name: file[name] for name in file.files}
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name].copy())

    def item(self, name: str) -> Any:
        """A 0-d array as a Python value; a float32 becomes the decimal it was written from (0.3, not 0.30000001)."""
        value = self.arrays[name]
        return float(str(value[()])) if value.dtype == np.float32 else value.item()

    def strings(self, name: str) -> list[str]:
        return [str(value) for value in self.arrays[name].reshape(-1)]

    def prefixed(self, prefix: str) -> dict[str, torch.Tensor]:
        """All arrays ``prefix + rest``, by ``rest``."""
        return {
            name.removeprefix(prefix): self.tensor(name) for name in self.arrays if name.startswith(prefix)
        }


@dataclass(frozen=True)
class Adapter:
    slug: str
    needs: frozenset[str]
    run: Callable[[Case], None]


_adapters: dict[str, list[Adapter]] = {}


def golden(slug: str, *needs: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a check for the cases of ``slug`` that hold all arrays named in ``needs``."""

    def decorate(run: Callable[[Case], None]) -> Callable[[Case], None]:
        _adapters.setdefault(slug, []).append(Adapter(slug, frozenset(needs), run))
        return run

    return decorate


def load_adapters() -> None:
    for path in sorted(ADAPTERS.glob("*.py")):
        importlib.import_module(f"adapters.{path.stem}")


def adapters_of(slug: str) -> list[Adapter]:
    return _adapters.get(slug, [])


def adapter_for(slug: str, case: Case) -> Adapter:
    """The most demanding adapter whose arrays are all there; a case nobody recognises is a failure."""
    fitting = [adapter for adapter in adapters_of(slug) if adapter.needs <= case.arrays.keys()]
    if not fitting:
        raise AssertionError(f"no adapter of {slug} recognises a case with the arrays {sorted(case.arrays)}")
    return max(fitting, key=lambda adapter: len(adapter.needs))


def all_cases() -> list[tuple[str, str, Path]]:
    """``(test id, slug, file)`` of our own cases, then of those in ``ZOO_GOLDEN``."""
    roots = [("", OWN)]
    external = os.environ.get("ZOO_GOLDEN")
    if external:
        roots.append(("external/", Path(external)))
    return [
        (f"{prefix}{path.parent.name}/{path.stem}", path.parent.name, path)
        for prefix, root in roots
        for path in sorted(root.glob("*/*.npz"))
    ]
