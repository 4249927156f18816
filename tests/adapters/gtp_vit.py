from typing import Any

import torch
from golden_cases import Case, golden
from golden_vit import plain_vit, run_blocks
from pydantic import PrivateAttr
from torch.testing import assert_close

from zoo.engines.blocks import BlockView
from zoo.engines.patch_graphs import Rule
from zoo.engines.reductions import Absorb
from zoo.methods.encoder_tokens.gtp_vit import GTPViT

RULES: dict[str, Rule] = {
    "CLSAttnMean": "cls-mean",
    "CLSAttnMax": "cls-max",
    "IMGAttnMean": "received-mean",
    "IMGAttnMax": "received-max",
    "DiagAttnMean": "diagonal-mean",
    "DiagAttnMax": "diagonal-max",
    "MixedAttnMean": "product-mean",
    "MixedAttnMax": "product-max",
    "SumAttnMax": "sum-max",
    "CosSimMean": "unlike-mean",
    "CosSimMax": "unlike-max",
}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def left_of_graph(memory: dict[str, Any]) -> torch.Tensor:
    """The release cuts its graph down in every block; here the patches that are left point into the whole one."""
    rows = [
        graph[patches][:, patches] for graph, patches in zip(memory["graph"], memory["patches"], strict=True)
    ]
    return torch.stack(rows)


class Spy(GTPViT):
    """Writes down what enters the choice of each block."""

    _seen: list[tuple[torch.Tensor, torch.Tensor]] = PrivateAttr(default_factory=list)

    def propagate(self, view: BlockView) -> Absorb | None:
        self._seen.append((left_of_graph(view.memory), view.sizes))
        return super().propagate(view)


@golden(
    "gtp-vit", "attn", "x", "graph", "token_scales", "num_prop", "alpha", "out_x", "out_graph", "out_scales"
)
def select_and_propagate(case: Case) -> None:
    x = case.tensor("x")
    prefix = x.shape[1] - case.tensor("graph").shape[1]
    for theirs in [name.removeprefix("kept.") for name in case.arrays if name.startswith("kept.")]:
        method = GTPViT(propagated=case.item("num_prop"), alpha=case.item("alpha"), selection=RULES[theirs])
        graph = case.tensor("graph")
        patches = torch.arange(graph.shape[1]).expand(len(graph), -1)
        memory: dict[str, Any] = {"attention": case.tensor("attn"), "graph": graph, "patches": patches}
        absorb = method.propagate(BlockView(x, 0, prefix, None, memory))
        assert absorb is not None
        assert torch.equal(absorb.anchor[:, prefix:], case.tensor(f"kept.{theirs}"))
        assert torch.equal(absorb.moved, case.tensor(f"prop.{theirs}"))
        if theirs == "MixedAttnMax":
            assert_close(absorb.apply(x), case.tensor("out_x"), **CLOSE)
            assert_close(left_of_graph(memory), case.tensor("out_graph"), **CLOSE)
            scales = absorb.apply(case.tensor("token_scales").unsqueeze(-1)).squeeze(-1)
            assert_close(scales, case.tensor("out_scales"), **CLOSE)


@golden(
    "gtp-vit", "x", "grid", "num_heads", "depth", "num_prop", "num_neighbours", "sparsity", "graph0", "out"
)
def encoder(case: Case) -> None:
    x, depth, neighbours = case.tensor("x"), case.item("depth"), case.item("num_neighbours")
    assert x.shape[1] == case.item("grid") ** 2 + 1
    loaded = plain_vit(
        [case.prefixed(f"w.blocks.{block}.") for block in range(depth)],
        case.item("num_heads"),
        case.item("mlp_ratio"),
        case.item("ln_eps"),
    )
    loaded.model.layernorm.load_state_dict(case.prefixed("w.norm."))
    method = Spy(
        propagated=case.item("num_prop"),
        sparsity=case.item("sparsity"),
        alpha=case.item("alpha"),
        graph="mixed" if neighbours else "spatial",
        neighbours=max(neighbours, 1),
        token_scale=bool(case.item("token_scale")),
    )
    with method.apply(loaded):
        outputs = run_blocks(loaded, x)
    assert_close(loaded.model.layernorm(outputs[-1]), case.tensor("out"), **CLOSE)
    for block, (graph, scales) in enumerate(method._seen):
        if block == 0:
            assert_close(graph, case.tensor("graph0").expand_as(graph), **CLOSE)
            continue
        assert_close(outputs[block - 1], case.tensor(f"x_in{block}"), **CLOSE)
        assert_close(graph, case.tensor(f"graph_in{block}"), **CLOSE)
        if method.token_scale:
            assert_close(scales, case.tensor(f"scales_in{block}"), **CLOSE)
