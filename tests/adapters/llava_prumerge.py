import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.llava_prumerge import LlavaPruMerge, headless_attention, outlier_ratio


@golden(
    "llava-prumerge",
    "features",
    "query",
    "key",
    "adaptive",
    "reduction_ratio",
    "cls_attn",
    "outlier_ratio",
    "out_tokens",
)
def reduction(case: Case) -> None:
    features, keys = case.tensor("features"), case.tensor("key")
    attention = headless_attention(case.tensor("query")[:, 0], keys)[:, 1:]
    torch.testing.assert_close(attention, case.tensor("cls_attn"), rtol=1e-5, atol=1e-7)
    # The release pools the outliers of a batch; the ratio of the case is that of the whole batch.
    outliers = outlier_ratio(attention)
    assert abs(outliers - case.item("outlier_ratio")) < 1e-12
    ratio = outliers if case.item("adaptive") else case.item("reduction_ratio")
    expected = case.tensor("out_tokens")
    # Nothing in a case names the variant, but + keeps more than the ratio says.
    plus = expected.shape[1] > int(features.shape[1] * ratio) + 1
    fixed = None if case.item("adaptive") else ratio * (2 if plus else 1)
    method = LlavaPruMerge(plus=plus, keep_ratio=fixed)
    for sample, rows in enumerate(attention):
        weight = method.enriched(rows, keys[sample, 1:], method.centres(rows, ratio))
        torch.testing.assert_close(weight @ features[sample], expected[sample], rtol=0, atol=1e-4)
