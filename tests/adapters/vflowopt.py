import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens._patch_importance import global_attention, patch_entropy
from zoo.methods.visual_tokens._recycling import count_low, recycle


@golden(
    "vflowopt", "attn_head_mean", "pixels_uint8", "t", "alpha_v", "entropy", "attn_importance", "importance"
)
def importance_map(case: Case) -> None:
    attention, side = case.tensor("attn_head_mean"), case.item("patch")
    received = attention.mean(0, keepdim=True)
    assert int((received > case.item("t") * received.mean()).sum()) == case.item("n_global")
    emitted = global_attention(received, lambda rows: attention[rows].unsqueeze(0), case.item("t"))
    torch.testing.assert_close(emitted[0], case.tensor("attn_importance"), rtol=0, atol=1e-6)
    pixels = case.tensor("pixels_uint8").unfold(1, side, side).unfold(2, side, side)
    entropy = patch_entropy(pixels.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(2))
    torch.testing.assert_close(entropy, case.tensor("entropy"), rtol=0, atol=1e-5)
    total = emitted[0] + case.item("alpha_v") * entropy.softmax(-1)
    torch.testing.assert_close(total, case.tensor("importance"), rtol=0, atol=1e-6)


@golden(
    "vflowopt",
    "features",
    "importance",
    "local_h",
    "local_w",
    "cell",
    "keep_ratio",
    "num_low",
    "kept_index",
    "out_features",
    "out_importance",
)
def recycling(case: Case) -> None:
    features, importance, cell = case.tensor("features"), case.tensor("importance"), case.item("cell")
    rows, columns = case.item("local_h"), case.item("local_w")
    base = len(features) - rows * columns
    side = round(base**0.5)
    place = torch.cat((grid(side, side), grid(rows, columns)))
    part = (torch.arange(len(features)) >= base).long()
    low = count_low(len(features), case.item("keep_ratio"), cell)
    assert low == case.item("num_low")
    join = recycle(importance, part, (place / cell).floor().long(), low)
    assert join.anchor[0].tolist() == case.tensor("kept_index").tolist()
    merged = join.apply(features.unsqueeze(0))[0]
    torch.testing.assert_close(merged, case.tensor("out_features"), rtol=0, atol=1e-5)
    torch.testing.assert_close(importance[join.anchor[0]], case.tensor("out_importance"), rtol=0, atol=1e-6)


def grid(rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
