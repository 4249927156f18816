import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.vtw import first_below, withdrawal_divergence


@golden("vtw", "logits_full", "logits_withdrawn", "first_layer", "eta", "kl", "k")
def search(case: Case) -> None:
    full, withdrawn = case.tensor("logits_full"), case.tensor("logits_withdrawn")
    divergence = torch.stack([withdrawal_divergence(p, q) for p, q in zip(full, withdrawn, strict=True)])
    torch.testing.assert_close(divergence, case.tensor("kl").float(), rtol=1e-4, atol=1e-8)
    assert first_below(divergence, case.item("eta"), case.item("first_layer")) == case.item("k")
