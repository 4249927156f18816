import torch
from golden_cases import Case, golden

from zoo.engines.reductions import Join
from zoo.methods.visual_tokens.vscan import VScan, most_similar


@golden(
    "vscan",
    "projected_features",
    "cls_attention_shallow",
    "cls_attention_deep",
    "grid",
    "window",
    "num_tokens",
    "keep_mask",
    "merged",
)
def visual_stage(case: Case) -> None:
    features, side = case.tensor("projected_features"), case.item("grid")
    method = VScan(window=case.item("window"))
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(
        0, 1
    )
    kept = method.scanned(
        case.tensor("cls_attention_shallow"),
        case.tensor("cls_attention_deep"),
        place,
        case.item("num_tokens"),
    )
    assert kept.tolist() == case.tensor("keep_mask").tolist()
    anchor, moved = kept.nonzero().T, (~kept).nonzero().T
    join = Join(anchor, moved, most_similar(features, kept).unsqueeze(0), len(features))
    torch.testing.assert_close(join.apply(features.unsqueeze(0))[0], case.tensor("merged"), atol=1e-5, rtol=0)
