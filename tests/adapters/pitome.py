import math
from typing import Any

import torch
from golden_cases import Case, golden
from torch.nn.functional import normalize
from torch.testing import assert_close

from zoo.engines.blocks import BlockView
from zoo.engines.reductions import Join
from zoo.methods.encoder_tokens.pitome import PiToMe, Rule, energies


def merge(case: Case, rule: Rule, size: torch.Tensor | None) -> Join:
    """What the method's own stage decides for the tokens of the case."""

    class Keys(BlockView):
        @property
        def mean_key(self) -> torch.Tensor:
            return case.tensor("metric")

    view = Keys(case.tensor("x"), 0, case.item("class_token"), None, {}, size)
    method = PiToMe(keep_ratio=case.item("ratio"), first=rule)
    join = method.merge(view, case.item("margin"), rule)
    assert join is not None
    return join


def compare(case: Case, join: Join) -> None:
    assert_close(join.apply(case.tensor("x")), case.tensor("merged_x"), rtol=1e-4, atol=1e-5)
    assert_close(join.sizes().unsqueeze(-1), case.tensor("merged_size"), rtol=1e-4, atol=1e-5)


@golden("pitome", "metric", "x", "size", "ratio", "margin", "use_bsm", "energy", "merged_x", "merged_size")
def vision(case: Case) -> None:
    rule: Rule = "bipartite" if case.item("use_bsm") else "ordered"
    join = merge(case, rule, case.tensor("size").squeeze(-1))
    compare(case, join)
    feature = normalize(case.tensor("metric")[:, case.item("class_token") :], dim=-1)
    energy = energies(feature @ feature.transpose(1, 2), case.item("margin"), rule)
    assert_close(energy, case.tensor("energy"), rtol=1e-4, atol=1e-5)
    patches = feature.shape[1]
    assert join.moved.shape[1] == case.item("r") == math.floor(patches - patches * case.item("ratio"))


@golden("pitome", "metric", "x", "ratio", "margin", "class_token", "merged_x", "merged_size")
def text(case: Case) -> None:
    options: dict[str, Any] = {"rule": "text", "size": None}
    compare(case, merge(case, **options))
