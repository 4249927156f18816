"""What the golden cases of sparsifying methods have in common: whole tiny models, and masks packed into bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from golden_cases import Case
from golden_llama import golden_llama

from zoo.families.weight_sparsity import WeightSparsifier
from zoo.models import LoadedModel


def combos(case: Case) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Prefix, options of the official code, and the budget as our sparsifiers take it."""
    for index, text in enumerate(case.strings("combos")):
        options = json.loads(text)
        removed, length = options["prune_n"], options["prune_m"]
        budget = (
            {"pattern": f"{length - removed}:{length}"}
            if removed
            else {"sparsity": options.get("sparsity_ratio", options.get("sparsity"))}
        )
        yield f"{index}.", options, budget


def module_of(model: Any, name: str) -> Any:
    """The linear layer called ``LAYER.MODULE``."""
    return model.get_submodule(f"model.layers.{name}")


def check_model(method: WeightSparsifier, case: Case, prefix: str, weight_atol: float | None = None) -> None:
    """Sparsify the model of a case and compare zeros, weights (if a tolerance is given) and logits."""
    applied = method.apply(LoadedModel(golden_llama(case)), calibration=case.tensor("input_ids"))
    for name, packed in case.prefixed(f"{prefix}mask.").items():
        weight = module_of(applied.model, name).weight
        bits = np.unpackbits(packed.numpy(), axis=1)[:, : weight.shape[1]]
        removed = torch.from_numpy(bits.astype(bool))
        # Statistics measured behind earlier sparse layers differ in their last digits, which may turn a near tie.
        assert float(((weight == 0) != removed).float().mean()) <= 1e-3, name
        if weight_atol is not None:
            expected = case.tensor(f"{prefix}weight.{name}")
            same = (weight == 0) == removed
            torch.testing.assert_close(weight[same], expected[same], rtol=1e-3, atol=weight_atol)
    with torch.no_grad():
        logits = applied(input_ids=case.tensor("eval_ids")).logits
    torch.testing.assert_close(logits, case.tensor(f"{prefix}logits"), rtol=0.0, atol=1e-3)
