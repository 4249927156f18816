"""FLAP against its official code: statistics, scores, thresholds, masks, biases, logits of the pruned model."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import Case, golden
from golden_llama import check_logits, close, golden_llama

from zoo.engines.statistics import stream
from zoo.methods.weights.flap import Flap
from zoo.models import LoadedModel


def method_of(case: Case, tag: str) -> Flap:
    metric, structure, _ = tag.split("_")
    settings: dict[str, Any] = {"metric": metric, "structure": f"{structure[:2]}-{structure[2:]}"}
    if structure.endswith("MM"):
        settings["remove_heads"] = int(case.item(f"{tag}.remove_heads"))
    return Flap(sparsity=case.item(f"{tag}.ratio"), **settings)


@golden("flap", "config_json", "input_ids", "eval_ids", "combos", "attn_fluc", "mlp_fluc")
def flap(case: Case) -> None:
    loaded = LoadedModel(golden_llama(case))
    ids = case.tensor("input_ids")
    decoder = loaded.anatomy.decoder
    assert decoder is not None

    # WIFN watches what every metric needs. Batches of three: values must not depend on batching.
    seen = stream(decoder, ids, Flap(metric="WIFN").observe, batch=3)
    for name, part in (("attn", "attention"), ("mlp", "mlp")):
        close([layer[part].value for layer in seen], case.tensor(f"{name}_fluc"), rtol=1e-4, atol=1e-7)
        close([layer[part].mean for layer in seen], case.tensor(f"{name}_baseline"), rtol=1e-4, atol=1e-6)
        if f"{name}_scaler" in case:
            close([layer[f"{part} squares"].mean for layer in seen], case.tensor(f"{name}_scaler"), rtol=1e-4)

    for tag in case.strings("combos"):
        method = method_of(case, tag)
        heads, channels = method.scores(decoder, seen)
        if method.structure.startswith("UL"):
            close(heads, case.tensor(f"{tag}.attn_raw"), rtol=2e-4)
            close(channels, case.tensor(f"{tag}.mlp_raw"), rtol=1e-4)
        else:
            layers = list(zip(decoder.layers, seen, strict=True))
            raw = [method.channel_scores(s, "attention", x.attention.output.weight) for x, s in layers]
            close(raw, case.tensor(f"{tag}.attn_raw"), rtol=2e-4)  # squared: twice the relative error
            raw = [method.channel_scores(s, "mlp", x.mlp.down.weight) for x, s in layers]
            close(raw, case.tensor(f"{tag}.mlp_raw"), rtol=1e-4)
            close(heads, case.tensor(f"{tag}.attn_std"), atol=1e-4)
            close(channels, case.tensor(f"{tag}.mlp_std"), atol=1e-4)
        if f"{tag}.threshold" in case:
            threshold = method.threshold(decoder, heads, channels)
            torch.testing.assert_close(threshold, case.tensor(f"{tag}.threshold"), rtol=0.0, atol=1e-4)

        cuts = method.decide(decoder, seen)
        close([cut.heads for cut in cuts], case.tensor(f"{tag}.attn_mask"))
        close([cut.channels for cut in cuts], case.tensor(f"{tag}.mlp_mask"))
        close([cut.output_bias for cut in cuts], case.tensor(f"{tag}.o_bias"), atol=1e-5)
        close([cut.down_bias for cut in cuts], case.tensor(f"{tag}.down_bias"), atol=1e-5)
        check_logits(method.apply(loaded, calibration=ids), case, f"{tag}.logits")
