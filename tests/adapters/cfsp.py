"""CFSP against its official code, and the two baselines of the same repository."""

from __future__ import annotations

import json
from typing import Any

import torch
from golden_cases import Case, golden
from golden_llama import check_logits, close, golden_llama

from zoo.engines.budgets import rank_threshold, standardise
from zoo.engines.scores import mean_contribution, weight_times_norm, weighted_fluctuation
from zoo.engines.statistics import SquareSum, Watch, stream
from zoo.engines.surgery import LayerCut, cut_layers, share_parameters
from zoo.methods.weights.cfsp import Cfsp
from zoo.methods.weights.flap import Fluctuation
from zoo.models import LoadedModel
from zoo.models.anatomy import DecoderLayer

COARSE = ("angular", "cosine", "mse", "mae")


def cfsp_case(case: Case, combo: dict[str, Any], prefix: str, loaded: LoadedModel) -> None:
    coarse = combo["global_metrics"]
    method = Cfsp(
        ffn_sparsity=combo["pruning_ratio"],
        coarse=coarse if coarse in COARSE else "none",  # the code treats any other name as "all layers alike"
        fine=combo["local_metrics"],
        slope=combo["a"],
        weight_exponent=combo["b"],
        norm_exponent=combo["c"],
        round_to=128 if combo["cuda_friendly"] else None,
        scale="released",
    )
    ids, decoder = case.tensor("input_ids"), loaded.anatomy.decoder
    assert decoder is not None
    seen = stream(decoder, ids, method.observe, batch=3)
    importance = torch.tensor([layer["distance"].total for layer in seen], dtype=torch.float64)
    torch.testing.assert_close(importance, case.tensor(f"{prefix}layer_importance"), rtol=0.0, atol=1e-3)
    close([layer["norm"].mean for layer in seen], case.tensor("down_scaler_row"), rtol=1e-4)
    sigmoid, ratios = method.keep_ratios(decoder, seen)
    torch.testing.assert_close(sigmoid, case.tensor(f"{prefix}sigmoid"), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(ratios, case.tensor(f"{prefix}keep_ratio"), rtol=0.0, atol=1e-6)
    scores = [method.channel_scores(x.mlp, s["norm"].mean) for x, s in zip(decoder.layers, seen, strict=True)]
    close(scores, case.tensor(f"{prefix}score"), rtol=1e-4)
    cuts = method.decide(decoder, seen)
    kept = [score[cut.channels].min() for score, cut in zip(scores, cuts, strict=True)]
    close(kept, case.tensor(f"{prefix}threshold"), rtol=1e-4)  # the lowest score that stays is the threshold
    close([cut.channels for cut in cuts], case.tensor(f"{prefix}mlp_mask"))
    check_logits(method.apply(loaded, calibration=ids), case, f"{prefix}logits")


def baseline_case(case: Case, combo: dict[str, Any], prefix: str, loaded: LoadedModel) -> None:
    """``flap_bias`` and ``wanda_sp``: FFN channels of all layers under one threshold, with and without a bias."""
    with_bias = combo["method"] == "flap_bias"

    def observe(layer: DecoderLayer) -> dict[str, Watch]:
        return {"down": Watch(layer.mlp.down, Fluctuation() if with_bias else SquareSum())}

    model = share_parameters(loaded.model)
    decoder = LoadedModel(model).anatomy.decoder
    assert decoder is not None
    seen = [layer["down"] for layer in stream(decoder, case.tensor("input_ids"), observe, batch=3)]
    weights = [layer.mlp.down.weight.detach() for layer in decoder.layers]
    scores = standardise(
        torch.stack(
            [
                weighted_fluctuation(weight, s.value) if with_bias else weight_times_norm(weight, s.mean)
                for weight, s in zip(weights, seen, strict=True)
            ]
        )
    )
    torch.testing.assert_close(scores, case.tensor(f"{prefix}score"), rtol=1e-4, atol=1e-5)
    threshold = rank_threshold(scores, combo["pruning_ratio"])
    torch.testing.assert_close(threshold, case.tensor(f"{prefix}threshold"), rtol=1e-4, atol=1e-5)
    masks = list(scores > threshold)
    close(masks, case.tensor(f"{prefix}mlp_mask"))
    biases: list[torch.Tensor | None] = [None] * len(masks)
    if with_bias:
        layers = zip(weights, seen, masks, strict=True)
        biases = [mean_contribution(weight, s.mean, mask) for weight, s, mask in layers]
        close(biases, case.tensor(f"{prefix}down_bias"), atol=1e-5)
    cut_layers(decoder, [LayerCut(channels=m, down_bias=b) for m, b in zip(masks, biases, strict=True)])
    check_logits(model, case, f"{prefix}logits")


@golden("cfsp", "config_json", "input_ids", "eval_ids", "combos", "down_scaler_row")
def cfsp(case: Case) -> None:
    loaded = LoadedModel(golden_llama(case))
    for index, text in enumerate(case.strings("combos")):
        combo = json.loads(text)
        check = {"cfsp": cfsp_case, "flap_bias": baseline_case, "wanda_sp": baseline_case}[combo["method"]]
        check(case, combo, f"{index}.", loaded)
