import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.entropyprune import EntropyPrune, count_for_average, token_entropy


@golden(
    "entropyprune",
    "query_states",
    "image_start",
    "image_length",
    "save_num",
    "token_entropy",
    "kept_indices_by_entropy",
    "kept_sorted",
)
def selection(case: Case) -> None:
    start, number = case.item("image_start"), case.item("image_length")
    method = EntropyPrune(keep_tokens=case.item("save_num"))
    entropy = token_entropy(case.tensor("query_states")[0, :, start : start + number])
    torch.testing.assert_close(entropy, case.tensor("token_entropy"), rtol=1e-6, atol=1e-9)
    order = method.order(entropy, method.budget(number, depth=32)) + start
    assert order.tolist() == case.tensor("kept_indices_by_entropy").tolist()
    assert order.sort().values.tolist() == case.tensor("kept_sorted").tolist()


@golden("entropyprune", "layers_avg_K_imglen_savenum")
def schedule(case: Case) -> None:
    for depth, average, layer, tokens, expected in case.tensor("layers_avg_K_imglen_savenum").tolist():
        assert count_for_average(average, tokens, layer, depth) == expected
        if expected > 0:
            assert EntropyPrune(average_tokens=average, layer=layer).budget(tokens, depth) == expected
