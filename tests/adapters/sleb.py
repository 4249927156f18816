"""SLEB against its official code: the loss of every candidate at every step, and the order of removal."""

from __future__ import annotations

import torch
from golden_cases import Case, golden
from golden_llama import golden_llama

from zoo.methods.weights.sleb import Sleb
from zoo.models.anatomy import anatomy_of


@golden("sleb", "input_ids", "num_remove", "removal_order", "candidate_losses")
def sleb(case: Case) -> None:
    decoder = anatomy_of(golden_llama(case)).decoder
    assert decoder is not None
    method = Sleb(
        layers=case.item("num_remove"),
        early_barrier=case.item("early_barrier"),
        latter_barrier=case.item("latter_barrier"),
    )
    removals = method.search(decoder, case.tensor("input_ids"), batch=3)
    assert [removal.block.index for removal in removals] == case.tensor("removal_order").tolist()
    losses = torch.tensor([loss for removal in removals for loss in removal.scores.values()])
    torch.testing.assert_close(losses, case.tensor("candidate_losses"), rtol=1e-4, atol=0.0)
