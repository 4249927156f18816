"""Wanda and plain magnitude against Wanda's official code: statistics, alphas, masks, logits."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import Case, golden
from golden_sparse import check_model, combos

from zoo.engines.statistics import SquareSum
from zoo.methods.weights.magnitude import Magnitude
from zoo.methods.weights.wanda import Wanda, by_cumulative_share, importance
from zoo.models.anatomy import LinearPart


def recording(statistics: list[dict[str, torch.Tensor]], alphas: list[dict[str, float]]) -> type[Wanda]:
    """Wanda that notes, per layer, what it sees of each linear, and the alpha of the variant."""

    class Recording(Wanda):
        def sparsify(self, part: LinearPart, seen: SquareSum, sparsity: float) -> torch.Tensor:
            if part.name == "q_proj":
                statistics.append({})
                alphas.append({})
            statistics[-1][part.name] = seen.mean
            if self.variant:
                scores = importance(part.weight, seen.mean)
                alphas[-1][part.name] = by_cumulative_share(scores, sparsity)[1]
            return super().sparsify(part, seen, sparsity)

    return Recording


def wanda_case(case: Case, prefix: str, options: dict[str, Any], budget: dict[str, Any]) -> None:
    statistics: list[dict[str, torch.Tensor]] = []
    alphas: list[dict[str, float]] = []
    method = recording(statistics, alphas)(variant=options["use_variant"], **budget)
    check_model(method, case, prefix)
    for name, expected in case.prefixed(f"{prefix}scaler_row.").items():
        layer, _, module = name.split(".")
        torch.testing.assert_close(statistics[int(layer)][module], expected, rtol=1e-4, atol=1e-6)
    for name, expected in case.prefixed(f"{prefix}alpha.").items():
        layer, _, module = name.split(".")
        assert alphas[int(layer)][module] == expected.item()


@golden("wanda", "config_json", "input_ids", "eval_ids", "combos")
def wanda(case: Case) -> None:
    for prefix, options, budget in combos(case):
        if options["method"] == "magnitude":
            check_model(Magnitude(**budget), case, prefix)
        else:
            wanda_case(case, prefix, options, budget)
