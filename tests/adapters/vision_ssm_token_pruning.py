import torch
from golden_cases import Case, golden
from torch.testing import assert_close

from zoo.methods.encoder_tokens.vision_ssm_token_pruning import keep_tokens, released_score


@golden(
    "vision-ssm-token-pruning",
    "hidden_states",
    "residual",
    "bwd_scan_out",
    "keep_ratio",
    "cls_pos",
    "out_hidden",
)
def pruning_step(case: Case) -> None:
    backward = case.tensor("bwd_scan_out").transpose(1, 2)
    scores = released_score(backward)
    assert_close(scores, case.tensor("score"), rtol=1e-5, atol=1e-5)
    cls = case.item("cls_pos")
    kept = keep_tokens(scores, case.item("keep_ratio"), cls)
    assert kept[:, kept.shape[1] // 2].tolist() == [cls] * len(kept)
    without = torch.cat((kept[:, : kept.shape[1] // 2], kept[:, kept.shape[1] // 2 + 1 :]), dim=1)
    assert torch.equal(without, case.tensor("kept_idx_without_cls"))
    for given, expected in (("hidden_states", "out_hidden"), ("residual", "out_residual")):
        tokens = case.tensor(given)
        gathered = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        assert torch.equal(gathered, case.tensor(expected))
