import torch
from golden_cases import Case, golden

from zoo.methods.diffusion._simprune import similarity_prune


@golden("optiprune", "metric", "noise", "features", "base_idx", "pruned_idx", "recover_source_idx")
def simprune(case: Case) -> None:
    tokens = case.tensor("metric")
    assert int(tokens.shape[1] * case.item("prune_ratio")) == case.item("num_prune")
    bases, reuse = similarity_prune(
        tokens,
        (case.item("h"), case.item("w")),
        case.tensor("noise"),
        case.item("prune_ratio"),
        patch=(case.item("sy"), case.item("sx")),
        beta=case.item("sim_beta"),
        alpha=case.item("noise_alpha"),
    )
    assert torch.equal(bases.sort(1).values, case.tensor("base_idx"))
    kept = torch.zeros_like(case.tensor("kept_mask")).scatter(1, reuse.kept, True)
    assert torch.equal(kept, case.tensor("kept_mask"))
    assert torch.equal((~kept).nonzero()[:, 1].view(len(kept), -1), case.tensor("pruned_idx"))
    assert torch.equal(reuse.kept.gather(1, reuse.source), case.tensor("recover_source_idx"))
    features = case.tensor("features")
    assert torch.equal(reuse.restore(reuse.shorten(features)), case.tensor("recovered_features"))
