"""ARMOR against its official code: normalisation, start, steps of Adam, choosing the core anew."""

from __future__ import annotations

import json

import torch
from golden_cases import Case, golden

from zoo.methods.weights._armor_factors import Factors, adam, descend, greedy, normalised, reselect

PATTERN = (2, 4)


def check(factors: Factors, case: Case, when: str) -> None:
    """Compare mask, core (where it is kept) and loss with the arrays that ``when`` names."""
    weight, moment = case.tensor("W_norm"), case.tensor("hessian_diag")
    mask, core, loss = (case.tensor(when.format(name)) for name in ("mask", "core", "loss"))
    assert torch.equal(factors.mask, mask)
    torch.testing.assert_close(factors.core * mask, core * mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.loss(weight, moment).double(), loss, rtol=1e-5, atol=0)


@golden("armor", "W", "hessian_diag", "mask_init", "A_blocks", "B_blocks", "core_after_adam", "meta")
def factors_of_one_matrix(case: Case) -> None:
    meta = json.loads(case.item("meta"))
    weight, columns, rows = normalised(case.tensor("W"))
    for found, name in ((weight, "W_norm"), (columns, "norm0"), (rows, "norm1")):
        torch.testing.assert_close(found, case.tensor(name), rtol=0, atol=1e-5)
    weight, moment = case.tensor("W_norm"), case.tensor("hessian_diag")
    factors = Factors.start(weight, moment, PATTERN, meta["block_size"])
    check(factors, case, "{}_init")

    optimiser = adam(factors, meta["lr"])
    for _ in range(meta["adam_steps"]):
        descend(factors, optimiser, weight, moment)
    for found, name in (
        (factors.left, "A_blocks"),
        (factors.right, "B_blocks"),
        (factors.core, "core_after_adam"),
    ):
        torch.testing.assert_close(found.detach(), case.tensor(name), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        loss = factors.loss(weight, moment).double()
    torch.testing.assert_close(loss, case.tensor("loss_after_adam"), rtol=1e-3, atol=0)

    # The discrete steps start from the recorded factors, so that no difference of Adam's steps hides in them.
    factors = Factors(
        *(case.tensor(name) for name in ("A_blocks", "core_after_adam", "mask_init", "B_blocks"))
    )
    assert meta["select"] == "gradient_all_greedy"
    for step in range(meta["sparse_steps"]):
        reselect(factors, weight, moment, PATTERN, greedy)
        check(factors, case, f"step{step}." + "{}")
        product = case.tensor(f"step{step}.W_hat_norm")
        torch.testing.assert_close(factors.product(), product, rtol=0, atol=1e-5)
