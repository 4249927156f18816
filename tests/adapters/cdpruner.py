import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.cdpruner import CDPruner, relevance


@golden(
    "cdpruner",
    "projected_features",
    "image_embeds",
    "text_embeds",
    "visual_token_num",
    "relevance",
    "selection_order",
    "index_mask",
)
def selection(case: Case) -> None:
    scores = relevance(case.tensor("image_embeds"), case.tensor("text_embeds"), sign=-1.0)
    torch.testing.assert_close(scores, case.tensor("relevance"), rtol=1e-5, atol=1e-5)
    method = CDPruner(keep_tokens=case.item("visual_token_num"))
    for crop, features in enumerate(case.tensor("projected_features")):
        order = method.order(features, scores[crop], method.count(len(features)))
        assert order.tolist() == case.tensor("selection_order")[crop].tolist()
        kept = case.tensor("index_mask")[crop].nonzero().squeeze(-1)
        assert order.sort().values.tolist() == kept.tolist()
