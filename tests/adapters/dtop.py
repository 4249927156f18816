from typing import Any

import torch
from golden_cases import Case, golden
from torch.testing import assert_close

from zoo.engines.blocks import BlockView
from zoo.methods.encoder_tokens.dtop import DToP
from zoo.models.segvit import MaskHead

PARTS = {
    "among.output": "self_attn.out_proj",
    "across.query": "multihead_attn.q",
    "across.key": "multihead_attn.k",
    "across.value": "multihead_attn.v",
    "across.output": "multihead_attn.proj",
    "up": "linear1",
    "down": "linear2",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
}


def mask_head(case: Case) -> MaskHead:
    weights = case.prefixed("w.")
    size, dim = weights["input_proj.weight"].shape
    head = MaskHead(dim, size, case.item("layers"), case.item("num_heads"), case.item("num_classes"))
    state = {"queries.weight": weights["q.weight"]}
    for kind in ("weight", "bias"):
        for ours, theirs in {"project": "input_proj", "norm": "proj_norm", "classify": "class_embed"}.items():
            state[f"{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
        for number in range(case.item("layers")):
            layer = f"decoder.layers.{number}"
            for ours, theirs in PARTS.items():
                state[f"layers.{number}.{ours}.{kind}"] = weights[f"{layer}.{theirs}.{kind}"]
            stacked = weights[f"{layer}.self_attn.in_proj_{kind}"].chunk(3)
            for ours, part in zip(("query", "key", "value"), stacked, strict=True):
                state[f"layers.{number}.among.{ours}.{kind}"] = part
    head.load_state_dict(state)
    return head.eval()


@golden("dtop", "x", "batch_idx_in", "canvas_in", "num_heads", "layers", "thresh", "topk_protect", "pred")
@torch.no_grad()
def head(case: Case) -> None:
    x, gone = case.tensor("x"), case.tensor("batch_idx_in")
    memory: dict[str, Any] = {
        "canvas": case.tensor("canvas_in"),
        "places": torch.arange(x.shape[1]).expand(len(x), -1),
    }
    method = DToP(threshold=case.item("thresh"), protect=case.item("topk_protect"))
    decision = method.leave(BlockView(x, 0, 0, ~gone, memory), mask_head(case))
    if decision is not None:
        gone = torch.ones_like(gone)
        for row, (index, valid) in enumerate(zip(decision.index, memory["valid"], strict=True)):
            gone[row, index[valid]] = False
    assert torch.equal(gone, case.tensor("batch_idx_out"))
    (said,) = memory["exits"]
    assert_close(said.classes, case.tensor("cls_logits"), rtol=1e-4, atol=1e-4)
    assert_close(said.masks, case.tensor("canvas_out"), rtol=1e-4, atol=1e-4)
    assert_close(said.scores, case.tensor("pred"), rtol=1e-4, atol=1e-4)
