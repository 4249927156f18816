"""DepGraph's group norms against Torch-Pruning on a residual block: scores, kept channels, output after pruning."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import Case, golden
from torch import nn

from zoo.engines.coupling import Group, Member
from zoo.engines.surgery import Cuts
from zoo.families.group_pruning import sizes_of
from zoo.methods.weights.torch_pruning_groupnorm import GroupNorm
from zoo.models.anatomy import LinearPart


class Block(nn.Module):
    """``e = emb(x)``; ``head(e + fc2(gelu(fc1(norm(e)))))``."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name in ("emb", "fc1", "fc2", "head"):
            rows, columns = weights[f"{name}.weight"].shape
            setattr(self, name, nn.Linear(columns, rows))
        self.ln = nn.LayerNorm(len(weights["ln.weight"]))
        self.load_state_dict(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        emb, fc1, fc2, head = (getattr(self, name) for name in ("emb", "fc1", "fc2", "head"))
        e = emb(x)
        inner = nn.functional.layer_norm(e, e.shape[-1:], self.ln.weight, self.ln.bias, self.ln.eps)
        return head(e + fc2(nn.functional.gelu(fc1(inner))))


NORMALISERS = {"standarization": "standardise"}


@golden("torch-pruning-groupnorm", "x", "y_pruned", "kept_residual", "kept_hidden", "pruning_ratio")
def group_norm(case: Case) -> None:
    block = Block(case.prefixed("w."))
    emb, fc1, fc2, head = (LinearPart(block, name) for name in ("emb", "fc1", "fc2", "head"))
    groups = {
        "residual": Group(
            "residual",
            0,
            (Member(emb, 0), Member(block.ln, 0), Member(fc1, 1), Member(fc2, 0), Member(head, 1)),
        ),
        "hidden": Group("mlp", 0, (Member(fc1, 0), Member(fc2, 1))),
    }
    for name, group in groups.items():
        for tag, expected in case.prefixed(f"{name}.").items():
            norm, reduction, normaliser = tag.split("_")
            options: dict[str, Any] = {"p": float(norm.removeprefix("l")), "reduction": reduction}
            method = GroupNorm(normaliser=NORMALISERS.get(normaliser, normaliser), **options)
            torch.testing.assert_close(method.channel_scores(group), expected, rtol=1e-5, atol=1e-5)

    method = GroupNorm(ratio=case.item("pruning_ratio"))
    scores = [method.channel_scores(group) for group in groups.values()]
    assert method.ratio is not None
    masks = method.choose(list(groups.values()), scores, sizes_of(list(groups.values())), method.ratio)
    residual, hidden = masks
    for mask, name in zip(masks, groups, strict=True):
        assert torch.equal(mask.nonzero().squeeze(1), case.tensor(f"kept_{name}"))

    cuts = Cuts()
    for part, rows, columns in (
        (emb, residual, None),
        (fc1, hidden, residual),
        (fc2, residual, hidden),
        (head, None, residual),
    ):
        if rows is not None:
            cuts.rows(part, rows)
        if columns is not None:
            cuts.columns(part, columns)
    cuts.apply()
    block.ln.weight, block.ln.bias = (
        nn.Parameter(value.detach()[residual]) for value in (block.ln.weight, block.ln.bias)
    )
    with torch.no_grad():
        torch.testing.assert_close(block(case.tensor("x")), case.tensor("y_pruned"), rtol=1e-5, atol=1e-5)
