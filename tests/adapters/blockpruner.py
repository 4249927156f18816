"""BlockPruner against its official code: the perplexity of every candidate at every step, and the order of removal."""

from __future__ import annotations

import torch
from golden_cases import Case, golden
from golden_llama import golden_llama

from zoo.methods.weights.blockpruner import BlockPruner
from zoo.models.anatomy import anatomy_of

TYPES = {"attention": 0, "mlp": 1}


@golden("blockpruner", "input_ids", "num_remove", "removal_order", "candidate_ppl")
def blockpruner(case: Case) -> None:
    decoder = anatomy_of(golden_llama(case)).decoder
    assert decoder is not None
    method = BlockPruner(layers=case.item("num_remove"))
    removals = method.search(decoder, case.tensor("input_ids"), batch=case.item("batch_size"))
    order = [[TYPES[removal.block.part], removal.block.index] for removal in removals]
    assert order == case.tensor("removal_order").tolist()
    perplexities = torch.tensor([value for removal in removals for value in removal.scores.values()])
    torch.testing.assert_close(perplexities, case.tensor("candidate_ppl"), rtol=1e-4, atol=0.0)
