"""Minitron against its official importance estimators. Their layout is [batch index, tokens, batch, features]."""

from __future__ import annotations

import torch
from golden_cases import Case, golden

from zoo.engines.shapes import FeatureNorm, rank_heads
from zoo.engines.statistics import BlockDistance


def sequences(case: Case, name: str) -> torch.Tensor:
    """All sequences of a case's activations, ``[sequences, tokens, features]``."""
    return case.tensor(name).transpose(-3, -2).flatten(-4, -3)


def importance(activations: torch.Tensor) -> torch.Tensor:
    observer = FeatureNorm()
    for sequence in activations:
        observer.update(sequence)
    return observer.importance


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@golden("minitron", "ffn_inputs", "attn_proj_inputs", "layer_inputs", "layernorm_outputs")
def minitron(case: Case) -> None:
    close(importance(sequences(case, "ffn_inputs")), case.tensor("ffn_importance"))

    heads = importance(sequences(case, "attn_proj_inputs")).view(case.item("num_heads"), -1).norm(dim=1)
    assert torch.equal(rank_heads(heads, case.item("num_kv_groups")), case.tensor("head_ranking"))

    hooks = sequences(case, "layernorm_outputs")
    close(torch.stack([importance(hook) for hook in hooks]).sum(0), case.tensor("hidden_importance"))

    distance = BlockDistance("cosine")
    for before, after in zip(sequences(case, "layer_inputs"), sequences(case, "layer_outputs"), strict=True):
        distance.update(before, after)
    batches = len(case.tensor("layer_inputs"))
    close(torch.tensor(distance.total / distance.tokens * batches), case.tensor("depth_score"))
