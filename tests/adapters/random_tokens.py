import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.random_tokens import RandomTokens


@golden(
    "random-tokens",
    "torch_cpu_seed",
    "views",
    "tokens_per_view",
    "keep_ratio",
    "kept_flat_indices_in_output_order",
    "num_keep",
)
def before_the_llm(case: Case) -> None:
    number, each = case.item("views"), case.item("tokens_per_view")
    everything = torch.arange(number * each)
    groups = [everything[:each], everything[each:]] if number > 1 else [everything]
    method = RandomTokens(keep_ratio=case.item("keep_ratio"))
    drawn = method.draw(groups, -1, torch.Generator().manual_seed(case.item("torch_cpu_seed")))
    assert drawn.tolist() == case.tensor("kept_flat_indices_in_output_order").tolist()
    assert len(drawn) == case.item("num_keep")


@golden("random-tokens", "torch_cpu_seed", "num_tokens", "keep_ratio", "kept_sorted", "num_keep")
def inside_the_llm(case: Case) -> None:
    method = RandomTokens(schedule={2: case.item("keep_ratio")})
    tokens = torch.arange(case.item("num_tokens"))
    drawn = method.draw([tokens], 2, torch.Generator().manual_seed(case.item("torch_cpu_seed")))
    assert drawn.sort().values.tolist() == case.tensor("kept_sorted").tolist()
    assert len(drawn) == case.item("num_keep")
