import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.fastervlm import FasterVLM


def _masks(case: Case, method: FasterVLM) -> torch.Tensor:
    features, attention = case.tensor("features"), case.tensor("cls_attn").mean(1)
    mask = torch.zeros(attention.shape, dtype=torch.bool)
    for sample, row in enumerate(attention):
        kept = method.choose(row, features[sample], case.item("visual_token_num"))
        assert len(kept) == case.item("visual_token_num")
        mask[sample, kept] = True
    return mask


@golden("fastervlm", "features", "cls_attn", "visual_token_num", "score", "keep_mask", "kept_features")
def fastervlm(case: Case) -> None:
    torch.testing.assert_close(case.tensor("cls_attn").mean(1), case.tensor("score"))
    mask = _masks(case, FasterVLM())
    assert mask.tolist() == case.tensor("keep_mask").tolist()
    kept = torch.stack([features[row] for features, row in zip(case.tensor("features"), mask, strict=True)])
    assert torch.equal(kept, case.tensor("kept_features"))


@golden("fastervlm", "features", "cls_attn", "visual_token_num", "important_ratio", "keep_mask")
def vispruner(case: Case) -> None:
    method = FasterVLM(important_ratio=case.item("important_ratio"))
    assert _masks(case, method).tolist() == case.tensor("keep_mask").tolist()
