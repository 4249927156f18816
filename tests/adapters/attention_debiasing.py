from __future__ import annotations

import torch
from golden_cases import Case, golden
from pydantic import PrivateAttr

from zoo.engines.padding import covers_padding, touches_padding
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.attention_debiasing import AttentionDebiasing, debiased
from zoo.methods.visual_tokens.fastv import FastV


class _Recorded:
    """Stands where the attention tap stands, with the attention that the official code saw."""

    def __init__(self, attention: torch.Tensor) -> None:
        self.attention = attention

    def rows(self, sample: int, index: torch.Tensor) -> torch.Tensor:
        return self.attention[None, None]


class _Sized(AttentionDebiasing):
    """Told the size of the picture that stood behind the tokens."""

    _size: tuple[int, int, int] = PrivateAttr((0, 0, 0))

    def content(self, view: View) -> torch.Tensor:
        return self.padded(*self._size).flatten() == 0


@golden(
    "attention-debiasing",
    "attn",
    "image_wh",
    "grid",
    "threshold",
    "rate",
    "weight",
    "budget",
    "pad_mask",
    "unpad_mask_simple",
    "score",
    "kept_index",
)
def rescoring(case: Case) -> None:
    attention, grid = case.tensor("attn"), case.item("grid")
    width, height = case.tensor("image_wh").tolist()
    number = len(attention)
    method = _Sized(
        sigma=case.item("rate") * number,
        threshold=case.item("threshold"),
        host="fastv",
        host_parameters={"keep_tokens": case.item("budget"), "layer": 2},
    )
    method._size = (width, height, grid)
    assert torch.equal(1 - method.padded(width, height, grid), case.tensor("pad_mask").float())
    assert torch.equal(1 - touches_padding(width, height, grid), case.tensor("unpad_mask_simple").float())
    assert covers_padding(width, height, grid).shape == (grid, grid)
    index = torch.arange(number)
    hidden = torch.zeros(number, 1)
    view = View(
        hidden,
        index,
        index,
        hidden[:0],
        index[:0],
        number,
        layer=2,
        ordinal=index,
        _seen={1: _Recorded(attention)},
    )
    weight = method.weights(view.ordinal, view.total)
    torch.testing.assert_close(weight, case.tensor("weight"), rtol=1e-6, atol=0)
    score = debiased(attention, weight, method.content(view))
    torch.testing.assert_close(score, case.tensor("score"), rtol=1e-6, atol=0)
    host = method.hosting
    assert isinstance(host, FastV)
    reduction = method.reduce(host.select, view)
    assert reduction.anchor[0].tolist() == case.tensor("kept_index").tolist()
