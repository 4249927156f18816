import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.segpruner import SeGPruner, patch_centres


@golden(
    "segpruner",
    "features",
    "attn_received_heads",
    "depths",
    "cam2world",
    "intrinsic",
    "patch_size",
    "visual_token_num",
    "important_ratio",
    "lam",
    "patch_xyz",
    "index_mask",
)
def selection(case: Case) -> None:
    features, attention = case.tensor("features"), case.tensor("attn_received_heads").mean(1)
    centres = patch_centres(
        case.tensor("depths"), case.tensor("cam2world"), case.tensor("intrinsic"), case.item("patch_size")
    )
    torch.testing.assert_close(centres, case.tensor("patch_xyz"), atol=1e-4, rtol=0)
    method = SeGPruner(
        keep_tokens=case.item("visual_token_num"),
        important_ratio=case.item("important_ratio"),
        geometry_weight=case.item("lam"),
    )
    for view, expected in enumerate(case.tensor("index_mask")):
        order = method.order(features[view], attention[view], centres[view])
        assert order.sort().values.tolist() == expected.nonzero().squeeze(-1).tolist()
