import torch
from golden_cases import Case, golden
from golden_vit import plain_vit, run_blocks
from torch.testing import assert_close

from zoo.engines.matching import bipartite_soft_matching, merge_schedule, merges
from zoo.engines.provenance import Trace
from zoo.methods.encoder_tokens.tome import ToMe


@golden(
    "tome", "metric", "x", "size", "r", "class_token", "distill_token", "merged_x", "unmerged_x", "source"
)
def matching(case: Case) -> None:
    metric, x, size = case.tensor("metric"), case.tensor("x"), case.tensor("size")
    prefix = case.item("class_token") + case.item("distill_token")
    assert min(case.item("r"), merges(x.shape[1], prefix)) == case.item("r_effective")
    merge = bipartite_soft_matching(metric, case.item("r"), prefix, size.squeeze(-1))
    merged = merge.apply(x)
    assert_close(merged, case.tensor("merged_x"), rtol=1e-4, atol=1e-5)
    assert_close(merge.sizes().unsqueeze(-1), case.tensor("merged_size"), rtol=1e-4, atol=1e-5)
    trace = Trace(len(x), x.shape[1], x.device)
    trace.add(merge)
    assert torch.equal(trace.sources(), case.tensor("source"))
    assert_close(trace.spread(merged), case.tensor("unmerged_x"), rtol=1e-4, atol=1e-5)


@golden("tome", "x", "r_per_layer", "num_heads", "mlp_ratio", "ln_eps", "out0", "size0", "source")
def block_stack(case: Case) -> None:
    schedule = case.tensor("r_per_layer").tolist()
    loaded = plain_vit(
        [case.prefixed(f"w.{block}.") for block in range(len(schedule))],
        case.item("num_heads"),
        case.item("mlp_ratio"),
        case.item("ln_eps"),
    )
    for depth in range(1, len(schedule) + 1):
        with ToMe(r=tuple(schedule[:depth])).apply(loaded) as applied:
            outputs = run_blocks(loaded, case.tensor("x"))
        last = depth - 1
        assert_close(outputs[last], case.tensor(f"out{last}"), rtol=1e-4, atol=1e-4)
        assert_close(applied.sources.sum(-1, keepdim=True), case.tensor(f"size{last}"))
    assert torch.equal(applied.sources, case.tensor("source"))


@golden("tome", "num_layers", "r", "inflect", "schedule")
def schedule(case: Case) -> None:
    for layers, r, inflection, row in zip(
        case.tensor("num_layers").tolist(),
        case.tensor("r").tolist(),
        case.tensor("inflect").tolist(),
        case.tensor("schedule").tolist(),
        strict=True,
    ):
        assert merge_schedule(layers, r, inflection) == row[:layers]
