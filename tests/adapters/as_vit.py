from typing import Any

import torch
from golden_cases import Case, golden
from golden_vit import plain_vit, run_blocks
from pydantic import PrivateAttr
from torch.nn import functional
from torch.testing import assert_close

from zoo.engines.blocks import BlockView
from zoo.engines.probes import Seen
from zoo.engines.reductions import Keep
from zoo.methods.encoder_tokens._as_vit_training import LearningASViT, threshold_mask
from zoo.methods.encoder_tokens.as_vit import ASViT, above


class Spy(ASViT):
    """Writes down the scores that decide."""

    _scores: dict[int, torch.Tensor] = PrivateAttr(default_factory=dict)

    def drop(self, view: BlockView, **options: Any) -> Keep | None:
        self._scores[view.block] = view.memory["score"]
        return super().drop(view, **options)


@golden("as-vit", "x", "num_heads", "out", "token_score")
def attention(case: Case) -> None:
    x, weights, heads = case.tensor("x"), case.prefixed("w."), case.item("num_heads")
    parts = functional.linear(x, weights["qkv.weight"], weights.get("qkv.bias")).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    seen = Seen(query, key, value, None, query.shape[-1] ** -0.5, causal=False)
    memory: dict[str, Any] = {}
    method = ASViT()
    if "policy" in case:
        memory["policy"] = case.tensor("policy").squeeze(-1)
        method = LearningASViT()
    own = method.attend(BlockView(x, 0, 1, None, memory, _seen=seen))
    out = functional.linear(own.flatten(2), weights["proj.weight"], weights.get("proj.bias"))
    assert_close(out, case.tensor("out"), rtol=1e-3, atol=1e-5)
    assert_close(memory["score"], case.tensor("token_score"), rtol=1e-3, atol=1e-5)


@golden("as-vit", "score", "threshold", "tau", "hard_mask", "upstream", "grad_score", "grad_threshold")
def mask(case: Case) -> None:
    score = case.tensor("score").requires_grad_()
    threshold = case.tensor("threshold").to(score.dtype).requires_grad_()
    made = threshold_mask(score, threshold, case.item("tau"))
    assert torch.equal(made.detach(), case.tensor("hard_mask"))
    made.backward(case.tensor("upstream"))
    assert_close(score.grad, case.tensor("grad_score"), rtol=1e-3, atol=1e-5)
    assert_close(threshold.grad, case.tensor("grad_threshold"), rtol=1e-3, atol=1e-5)
    if len(score) > 1:
        assert above(score, case.item("threshold")).shape[1] == case.item("eval_keep_count")


@golden("as-vit", "patch_tokens", "num_heads", "pruning_loc", "thresholds", "tokens_per_layer", "logits")
def model(case: Case) -> None:
    weights, depth = case.prefixed("w."), case.item("depth")
    blocks = [case.prefixed(f"w.blocks.{number}.") for number in range(depth)]
    loaded = plain_vit(blocks, case.item("num_heads"), case.item("mlp_ratio"), case.item("ln_eps"))
    patches = case.tensor("patch_tokens")
    x = torch.cat((weights["cls_token"].expand(len(patches), -1, -1), patches), 1) + weights["pos_embed"]
    method = Spy(
        layers=tuple(case.tensor("pruning_loc").tolist()),
        thresholds=tuple(float(str(value)) for value in case.arrays["thresholds"]),
    )
    with method.apply(loaded) as applied:
        last = run_blocks(loaded, x)[-1]
        assert applied.tokens_per_block == case.tensor("tokens_per_layer").tolist()
    normed = functional.layer_norm(
        last[:, 0], last.shape[-1:], weights["norm.weight"], weights["norm.bias"], case.item("ln_eps")
    )
    logits = functional.linear(normed, weights["head.weight"], weights["head.bias"])
    assert_close(logits, case.tensor("logits"), rtol=1e-3, atol=1e-5)
    for block, score in method._scores.items():
        assert_close(score, case.tensor(f"score_used_at_{block}"), rtol=1e-3, atol=1e-5)
