"""The efficiency zoo: methods that make transformers cheaper, behind one interface.

Everything is imported on first use, so ``import zoo`` is instant and does not load torch::

    model = zoo.load_model("smollm2-135m")
    with zoo.method("prompt-lookup").apply(model) as applied:
        ids = applied.generate(**inputs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_model": "zoo.models.loading",
    "LoadedModel": "zoo.models",
    "Method": "zoo.interface",
    "Stack": "zoo.interface",
    "Applied": "zoo.interface",
    "method": "zoo.interface",
    "implemented": "zoo.interface",
    "register": "zoo.interface",
    "run": "zoo.runner",
    "evaluate": "zoo.evaluation",
    "train": "zoo.training",
    "Report": "zoo.report",
    "Card": "taxonomy.card",
    "ZooError": "zoo.errors",
}

__all__ = [
    "Applied",
    "Card",
    "LoadedModel",
    "Method",
    "Report",
    "Stack",
    "ZooError",
    "__version__",
    "evaluate",
    "implemented",
    "load_model",
    "method",
    "register",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'zoo' has no attribute '{name}'")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from taxonomy.card import Card
    from zoo.errors import ZooError
    from zoo.evaluation import evaluate
    from zoo.interface import Applied, Method, Stack, implemented, method, register
    from zoo.models import LoadedModel
    from zoo.models.loading import load_model
    from zoo.report import Report
    from zoo.runner import run
    from zoo.training import train
