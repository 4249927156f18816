import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens import holov
from zoo.methods.visual_tokens.holov import HoloV


@golden(
    "holov",
    "features",
    "cls_attn",
    "num_crops",
    "budget",
    "alpha",
    "attn_scale",
    "eps",
    "positions",
    "out_features",
)
def selection(case: Case) -> None:
    assert case.item("attn_scale") == holov._SCALE
    assert case.item("eps") == holov._EPSILON
    method = HoloV(beta=round(case.item("alpha"), 2), redistribute=False)
    budget, expected = case.item("budget"), case.tensor("positions")
    for sample, features in enumerate(case.tensor("features")):
        kept = method.choose(features, case.tensor("cls_attn")[sample], budget, case.item("num_crops"))
        # The release fills up with zero vectors at position -1.
        padding = budget - len(kept)
        assert [*kept.tolist(), *[-1] * padding] == expected[sample].tolist()
        out = torch.cat((features[kept], features.new_zeros(padding, features.shape[1])))
        torch.testing.assert_close(out, case.tensor("out_features")[sample], rtol=0, atol=1e-5)
