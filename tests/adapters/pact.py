import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.pact import PACT, importance


@golden(
    "pact",
    "hidden_states",
    "prerope_queries",
    "prerope_keys",
    "clustering_keys",
    "keep_fraction",
    "cutoff",
    "coef_pruned",
    "importance",
    "unpruned_mask",
    "center_mask_within_unpruned",
    "merged",
    "cluster_sizes",
)
def reduction(case: Case) -> None:
    hidden = case.tensor("hidden_states")
    method = PACT(
        important_ratio=case.item("keep_fraction"),
        cutoff=case.item("cutoff"),
        recovery=case.item("coef_pruned"),
    )
    scores = importance(case.tensor("prerope_queries"), case.tensor("prerope_keys"), hidden)
    torch.testing.assert_close(scores, case.tensor("importance"), rtol=1e-4, atol=0)
    unpruned = method.unpruned(scores)
    assert unpruned.tolist() == case.tensor("unpruned_mask").tolist()
    merge = method.merge(case.tensor("clustering_keys"), unpruned)
    centres = torch.zeros(len(hidden), dtype=torch.bool).index_fill(0, merge.anchor[0], True)
    assert centres[unpruned].tolist() == case.tensor("center_mask_within_unpruned").tolist()
    torch.testing.assert_close(merge.sizes()[0], case.tensor("cluster_sizes"), rtol=0, atol=0)
    torch.testing.assert_close(merge.apply(hidden.unsqueeze(0))[0], case.tensor("merged"), atol=1e-5, rtol=0)
