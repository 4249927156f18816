from __future__ import annotations

import torch
from golden_cases import Case, golden

from zoo.engines.sampling import accept_chain, longest_match


@golden(
    "speculative-sampling",
    "draft_logits",
    "target_logits",
    "draft_tokens",
    "uniforms",
    "n_accept",
    "next_dist",
    "greedy_n_accept",
)
def acceptance(case: Case) -> None:
    q = case.tensor("draft_logits").float().softmax(-1)
    p = case.tensor("target_logits").float().softmax(-1)
    draft = case.tensor("draft_tokens")
    accepted, following = accept_chain(p, draft, case.tensor("uniforms"), q)
    assert torch.equal(accepted, case.tensor("n_accept"))
    torch.testing.assert_close(following, case.tensor("next_dist").float(), rtol=0, atol=1e-5)

    choices = case.tensor("target_logits").argmax(-1)
    greedy = [
        longest_match(row.tolist(), choice.tolist()) for row, choice in zip(draft, choices, strict=True)
    ]
    assert greedy == case.tensor("greedy_n_accept").tolist()
