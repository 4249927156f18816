"""SparseGPT against its official class: Hessians, zeros, repaired weights, logits."""

from __future__ import annotations

import torch
from golden_cases import Case, golden
from golden_sparse import check_model, combos

from zoo.methods.weights.sparsegpt import SparseGPT


@golden("sparsegpt", "config_json", "input_ids", "eval_ids", "combos")
def whole_model(case: Case) -> None:
    for prefix, _, budget in combos(case):
        check_model(SparseGPT(**budget), case, prefix, weight_atol=1e-4)


@golden("sparsegpt", "W", "X", "H", "combos")
def one_linear(case: Case) -> None:
    weight, inputs, expected_hessian = (case.tensor(name) for name in ("W", "X", "H"))
    observer = SparseGPT().observer(weight.shape[1])
    for sequence in inputs.flatten(0, 1):
        observer.update(sequence)
    scale = float(expected_hessian.abs().max())
    torch.testing.assert_close(observer.hessian, expected_hessian, rtol=1e-5, atol=1e-6 * scale)
    for prefix, options, budget in combos(case):
        method = SparseGPT(block=options["blocksize"], damping=options["percdamp"], **budget)
        found, expected = (
            method.solve(weight, observer.hessian, method.target),
            case.tensor(f"{prefix}W_out"),
        )
        same = (found == 0) == (expected == 0)
        assert float(same.float().mean()) >= 0.995
        torch.testing.assert_close(found[same], expected[same], rtol=1e-3, atol=1e-4)
