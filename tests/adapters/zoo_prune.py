import torch
from golden_cases import Case, golden
from torch import nn

from zoo.methods.visual_tokens.zoo_prune import Projector, ZooPrune, sensitivity


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@golden(
    "zoo-prune",
    "vision_features",
    "w1",
    "b1",
    "w2",
    "b2",
    "directions",
    "h",
    "ratio",
    "k",
    "projected",
    "sensitivity",
    "selected_order",
    "kept_sorted",
)
@torch.no_grad()
def selection(case: Case) -> None:
    first = _linear(case.tensor("w1"), case.tensor("b1"))
    last = _linear(case.tensor("w2"), case.tensor("b2"))
    projector = Projector(None, first, nn.GELU(), last)
    features = case.tensor("vision_features")
    torch.testing.assert_close(
        last(nn.functional.gelu(first(features))), case.tensor("projected"), rtol=1e-4, atol=1e-5
    )
    method = ZooPrune(keep_ratio=case.item("ratio"), step=case.item("h"))
    found = sensitivity(features, projector, case.tensor("directions"), method.step)
    torch.testing.assert_close(found.double(), case.tensor("sensitivity"), rtol=1e-4, atol=0)
    assert method.count(len(features)) == case.item("k")
    order = method.order(case.tensor("projected"), found, method.count(len(features)))
    assert order.tolist() == case.tensor("selected_order").tolist()
    assert order.sort().values.tolist() == case.tensor("kept_sorted").tolist()
