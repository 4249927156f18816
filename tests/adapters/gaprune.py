"""GAPrune against its official functions: agreement of gradients, importance, zeros."""

from __future__ import annotations

import json

import torch
from golden_cases import Case, golden

from zoo.methods.weights._gradient_alignment import alignment
from zoo.methods.weights.gaprune import GAPrune


@golden("gaprune", "params", "combos")
def gaprune(case: Case) -> None:
    names = case.strings("params")
    agreements = {}
    for name in names:
        agreements[name] = alignment(case.tensor(f"{name}.g_general"), case.tensor(f"{name}.g_domain"))
        torch.testing.assert_close(agreements[name], case.tensor(f"{name}.alignment"), rtol=1e-5, atol=1e-7)
    for index, text in enumerate(case.strings("combos")):
        options = json.loads(text)
        method = GAPrune(
            ratio=options["pct"],
            beta=options["beta"],
            compression_weight=options["compression_weight"],
            postprocess=options["score_postproc"],
        )
        scores = []
        for name in names:
            weight, domain, general = (
                case.tensor(f"{name}.{kind}") for kind in ("W", "fisher_domain", "fisher_general")
            )
            scores.append(method.importance(weight, domain, general, agreements[name]))
            torch.testing.assert_close(scores[-1], case.tensor(f"{index}.{name}.score"), rtol=1e-5, atol=1e-5)
        kept = method.keep(scores, int(sum(score.numel() for score in scores) * options["pct"]))
        for name, mask in zip(names, kept, strict=True):
            assert torch.equal(~mask, case.tensor(f"{index}.{name}.pruned"))
