"""Týr-the-Pruner against its official local pruner: Hessians, which groups leave, re-solved weights."""

from __future__ import annotations

import re

import torch
from golden_cases import Case, golden

from zoo.engines.second_order import SecondMoment
from zoo.methods.weights._tyr_local import GroupPruner


@golden("tyr-the-pruner", "o.W", "o.X", "down.W", "down.X", "num_heads", "combos")
def local_pruner(case: Case) -> None:
    for tag in case.strings("combos"):
        parts = re.fullmatch(r"(\w+)\.sp([\d.]+)\.it(\d+)", tag)
        assert parts is not None
        kind, sparsity, updates = parts.groups()
        weight, inputs, moment = (case.tensor(f"{kind}.{name}") for name in ("W", "X", "H"))
        observer = SecondMoment()
        for sequence in inputs.flatten(0, -3):
            observer.update(sequence)
        scale = float(moment.abs().max())
        torch.testing.assert_close(observer.total, moment, rtol=1e-5, atol=1e-6 * scale)

        groups = int(case.item("num_heads")) if kind == "o" else weight.shape[1]
        pruner = GroupPruner(weight, observer.total, weight.shape[1] // groups)
        kept, found = pruner.keep(int(groups * (1 - float(sparsity))), int(updates))
        expected = case.tensor(f"{tag}.W_out")
        assert torch.equal(found == 0, expected == 0)
        assert torch.equal(found.abs().sum(0) > 0, kept.repeat_interleave(pruner.size))
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
