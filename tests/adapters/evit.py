import math
from typing import Any

import torch
from golden_cases import Case, golden
from golden_vit import plain_vit, run_blocks
from pydantic import PrivateAttr
from torch.testing import assert_close

from zoo.engines.blocks import BlockView
from zoo.engines.reductions import Join, Keep
from zoo.methods.encoder_tokens.evit import EViT, keep_rate_at


class Spy(EViT):
    """Writes down the scores and the decision of the method itself."""

    _seen: list[tuple[torch.Tensor, Keep | Join | None]] = PrivateAttr(default_factory=list)

    def reduce(self, view: BlockView, **options: Any) -> Keep | Join | None:
        decision = super().reduce(view, **options)
        self._seen.append((self.cls_attention(view), decision))
        return decision


@golden("evit", "x", "num_heads", "keep_rate", "fuse_token", "tokens", "cls_attn", "topk_idx", "out")
def block(case: Case) -> None:
    loaded = plain_vit(
        [case.prefixed("w.")], case.item("num_heads"), case.item("mlp_ratio"), case.item("ln_eps")
    )
    explicit = case.item("tokens")
    method = Spy(
        keep_ratio=case.item("keep_rate"),
        layers=(0,),
        fuse=bool(case.item("fuse_token")),
        tokens=None if explicit < 0 else (explicit,),
    )
    with method.apply(loaded):
        (out,) = run_blocks(loaded, case.tensor("x"))
    assert_close(out, case.tensor("out"), rtol=1e-4, atol=1e-5)
    assert out.shape[1] - 1 == case.item("n_tokens_out")
    for score, reduction in method._seen:
        assert_close(score, case.tensor("cls_attn"), rtol=1e-4, atol=1e-5)
        if reduction is None:
            continue
        kept = reduction.anchor[:, 1 : case.tensor("topk_idx").shape[1] + 1] - 1
        assert kept.tolist() == case.tensor("topk_idx").tolist()
        if isinstance(reduction, Join):
            fused = reduction.assignment == reduction.length - 1
            rows = [row.nonzero().flatten().sub(1).tolist() for row in fused]
            assert rows == case.tensor("complement_idx").tolist()


@golden("evit", "iters", "epoch", "shrink_start_epoch", "shrink_end_epoch", "iters_per_epoch", "keep_rate")
def keep_rate_schedule(case: Case) -> None:
    names = ("iters", "epoch", "base_keep_rate", "shrink_start_epoch", "shrink_end_epoch", "iters_per_epoch")
    rows = zip(*(case.tensor(name).tolist() for name in names), strict=True)
    for row, expected in zip(rows, case.tensor("keep_rate").tolist(), strict=True):
        assert math.isclose(keep_rate_at(*row), expected, rel_tol=1e-5)
