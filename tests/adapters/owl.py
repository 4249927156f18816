"""OWL against its official code: outlier shares and the sparsity of each layer."""

from __future__ import annotations

import torch
from golden_cases import Case, golden

from zoo.methods.weights.owl import layer_sparsities, outlier_percent
from zoo.methods.weights.wanda import importance


@golden("owl", "w1", "w2", "scaler1", "scaler2", "M", "lamda", "sparsity_ratio", "outlier_percent")
def ratios(case: Case) -> None:
    linears = [(case.tensor(f"w{number}"), case.tensor(f"scaler{number}")) for number in (1, 2)]
    percents = torch.tensor(
        [
            outlier_percent(
                [importance(weight[layer], squares[layer]) for weight, squares in linears], case.item("M")
            )
            for layer in range(len(linears[0][0]))
        ]
    )
    torch.testing.assert_close(percents, case.tensor("outlier_percent"), rtol=1e-5, atol=1e-5)
    sparsities = layer_sparsities(percents, case.item("sparsity_ratio"), case.item("lamda"))
    torch.testing.assert_close(sparsities, case.tensor("layer_sparsity"), rtol=0, atol=1e-5)
    torch.testing.assert_close(1 - sparsities, case.tensor("keep_ratio"), rtol=0, atol=1e-5)
