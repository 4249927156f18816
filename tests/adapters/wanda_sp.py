"""Wanda-sp and structured magnitude against their official code: statistics, scores, masks, logits."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import Case, golden
from golden_llama import check_logits, close, golden_llama

from zoo.engines.statistics import SquareSum
from zoo.methods.weights.magnitude_sp import MagnitudeSp
from zoo.methods.weights.wanda_sp import WandaSp
from zoo.models import LoadedModel


def recording(statistics: list[torch.Tensor], scores: list[torch.Tensor]) -> type[WandaSp]:
    """Wanda-sp that notes what it sees: first the attention of a layer, then its channels, and so on."""

    class Recording(WandaSp):
        def scores(self, weight: torch.Tensor, seen: SquareSum) -> torch.Tensor:
            statistics.append(seen.mean)
            scores.append(super().scores(weight, seen))
            return scores[-1]

    return Recording


def kept_units(dense: Any, pruned: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Masks of heads and channels per layer, by the rows of query and up projections that are still there."""
    heads, channels = [], []
    for before, after in zip(dense.model.layers, pruned.model.layers, strict=True):
        head_dim = before.self_attn.head_dim
        rows = [before.self_attn.q_proj.weight, after.self_attn.q_proj.weight]
        left, right = (weight.unflatten(0, (-1, head_dim)).flatten(1) for weight in rows)
        heads.append((left.unsqueeze(1) == right).all(-1).any(1))
        left, right = before.mlp.up_proj.weight, after.mlp.up_proj.weight
        channels.append((left.unsqueeze(1) == right).all(-1).any(1))
    return heads, channels


@golden("wanda-sp", "config_json", "input_ids", "eval_ids", "combos")
def structured(case: Case) -> None:
    model = golden_llama(case)
    for tag in case.strings("combos"):
        name, _, ratio = tag.rpartition("_")
        statistics: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        kinds = {"wanda_sp": recording(statistics, scores), "magnitude_sp": MagnitudeSp}
        method = kinds[name](ratio=float(ratio))
        applied = method.apply(LoadedModel(model), calibration=case.tensor("input_ids"))
        heads, channels = kept_units(model, applied.model)
        close(heads, case.tensor(f"{tag}.attn_mask"))
        close(channels, case.tensor(f"{tag}.mlp_mask"))
        check_logits(applied, case, f"{tag}.logits")
        if statistics:
            close(statistics[::2], case.tensor(f"{tag}.attn_scaler_row"), rtol=1e-4, atol=1e-7)
            close(statistics[1::2], case.tensor(f"{tag}.mlp_scaler_row"), rtol=1e-4, atol=1e-7)
            by_head = [score.view(len(heads[0]), -1).sum(1) for score in scores[::2]]
            close(by_head, case.tensor(f"{tag}.attn_score"), rtol=1e-4)
            close(scores[1::2], case.tensor(f"{tag}.mlp_score"), rtol=1e-4)
