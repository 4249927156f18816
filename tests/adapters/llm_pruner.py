"""LLM-Pruner against its official importance classes: scores of heads and channels, and what stays."""

from __future__ import annotations

import json

import torch
from golden_cases import Case, golden
from golden_llama import golden_llama

from zoo.engines.coupling import layer_groups
from zoo.families.group_pruning import sizes_of
from zoo.families.weights import Work
from zoo.methods.weights.llm_pruner import LlmPruner
from zoo.models import LoadedModel


@golden("llm-pruner", "config_json", "input_ids", "combos")
def llm_pruner(case: Case) -> None:
    case.arrays["eval_ids"] = case.arrays["input_ids"][:1]  # what the dense logits of these cases are on
    loaded = LoadedModel(golden_llama(case))
    work = Work(loaded, 0, None, None, lambda: case.tensor("input_ids"))
    for index, text in enumerate(case.strings("combos")):
        options = json.loads(text)
        method = LlmPruner(
            importance=options["taylor"] or options["kind"],
            grouping=options["group_reduction"],
            ratio=options["ratio"],
            keep_first=0,
            keep_last=0,
        )
        groups = layer_groups(work.decoder, method.pruned_layers(work.decoder))
        scores = method.score(work, groups)
        sizes = sizes_of(groups)
        kept = method.choose(groups, scores, sizes, method.share(work.decoder, sizes))
        for first, name in enumerate(("head", "mlp")):
            expected = case.tensor(f"{index}.{name}_score")
            torch.testing.assert_close(torch.stack(scores[first::2]), expected, rtol=1e-3, atol=1e-7)
            assert torch.equal(torch.stack(kept[first::2]), case.tensor(f"{index}.{name}_keep"))
