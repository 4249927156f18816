import torch
from golden_cases import Case, golden

from zoo.engines.selection import proportional_shares
from zoo.methods.visual_tokens.hiprune import HiPrune


@golden(
    "hiprune",
    "shallow_score",
    "deep_score",
    "grid_h",
    "grid_w",
    "retention_total",
    "budget_per_view",
    "alpha",
    "num_anchors",
    "keep_mask",
)
def selection(case: Case) -> None:
    objects, registers = case.tensor("shallow_score"), case.tensor("deep_score")
    views, size = objects.shape
    count = case.item("budget_per_view")
    # The release drops the remainder, here it goes to the first views.
    assert min(proportional_shares(case.item("retention_total"), [size] * views)) == count
    method = HiPrune(alpha=round(case.item("alpha"), 2))
    assert round(count * method.alpha / 5) == case.item("num_anchors")
    mask = torch.zeros(views, size, dtype=torch.bool)
    for view in range(views):
        mask[view, method.choose(objects[view], registers[view], count, case.item("grid_w"))] = True
    assert mask.tolist() == case.tensor("keep_mask").tolist()
