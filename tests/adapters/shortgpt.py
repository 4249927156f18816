"""ShortGPT against its official code: Block Influence, order, removed layers, logits; and the angular distances."""

from __future__ import annotations

import torch
from golden_cases import Case, golden
from golden_llama import golden_llama

from zoo.methods.weights.shortgpt import ShortGpt
from zoo.models import LoadedModel


def found(value: torch.Tensor, case: Case, name: str) -> None:
    torch.testing.assert_close(value, case.tensor(name).to(value).reshape(value.shape), rtol=0.0, atol=1e-3)


@golden("shortgpt", "config_json", "input_ids", "importance", "stride", "n_prune")
def shortgpt(case: Case) -> None:
    loaded, ids = LoadedModel(golden_llama(case)), case.tensor("input_ids")
    count, stride = int(case.tensor("n_prune")), int(case.tensor("stride"))
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    method = ShortGpt(layers=count, stride=stride)
    importance = method.importance(decoder, ids)
    found(importance, case, "importance")
    assert importance.argsort(stable=True).tolist() == case.tensor("order").tolist()
    found(method.distances(decoder, ids, count), case, "angular_n")
    raw = ShortGpt(final_norm=False, stride=ids.shape[1])
    found(raw.importance(decoder, ids)[-1], case, "last_layer_prenorm_bi")

    applied = method.apply(loaded, calibration=ids)
    removed = case.tensor("removed").tolist()
    assert applied.report.facts["removed"] == ", ".join(f"layer {index}" for index in removed)
    expected = case.tensor("logits_pruned")
    with torch.no_grad():
        logits = applied(input_ids=ids[: expected.shape[0], : expected.shape[1]]).logits
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-4)
