import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.visionzip import compress


@golden(
    "visionzip",
    "cls_attn_full",
    "hidden",
    "metric",
    "dominant",
    "contextual",
    "dominant_indices_incl_cls",
    "out_tokens",
)
def compression(case: Case) -> None:
    scores = case.tensor("cls_attn_full").mean(1)[:, 1:]
    # The release counts [CLS] among the dominant tokens.
    dominant, contextual = case.item("dominant") - 1, case.item("contextual")
    for sample, hidden in enumerate(case.tensor("hidden")):
        best, _, weight = compress(scores[sample], case.tensor("metric")[sample, 1:], dominant, contextual)
        assert [0, *(best + 1).tolist()] == case.tensor("dominant_indices_incl_cls")[sample].tolist()
        patches = hidden[1:]
        out = torch.cat((hidden[:1], patches[best.sort().values], weight @ patches))
        torch.testing.assert_close(out, case.tensor("out_tokens")[sample], rtol=0, atol=1e-5)
