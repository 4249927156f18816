from __future__ import annotations

import torch
from golden_cases import Case, golden

from zoo.engines.attention_mass import sum_and_peak
from zoo.engines.blocks import BlockView
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.mustdrop import MustDrop, attended


class _Recorded:
    """Stands where the attention tap stands, with the text rows that the official code saw."""

    def __init__(self, attention: torch.Tensor) -> None:
        self.attention = attention

    def rows(self, sample: int, index: torch.Tensor) -> torch.Tensor:
        return self.attention[:, index - self.attention.shape[-1]]


@golden("mustdrop", "tokens", "threshold", "window", "merged", "sizes")
def merging(case: Case) -> None:
    tokens = case.tensor("tokens").unsqueeze(0)
    method = MustDrop(merge_threshold=case.item("threshold"), window=case.item("window"))
    reduction = method.merge(BlockView(tokens, 0, 1, None, {}))
    if reduction is None:
        assert tokens.shape[1] == len(case.tensor("merged"))
        return
    torch.testing.assert_close(reduction.apply(tokens)[0], case.tensor("merged"), rtol=1e-5, atol=1e-5)
    sizes = reduction.assignment[0].bincount(minlength=reduction.length)
    assert sizes.tolist() == case.tensor("sizes").flatten().tolist()


@golden(
    "mustdrop",
    "attn_text_rows",
    "v_token_start",
    "n_visual",
    "global_thr",
    "individual_thr",
    "key_set",
    "important",
    "kept",
    "key_set_after",
)
def filtering(case: Case) -> None:
    attention = case.tensor("attn_text_rows")
    start, number = case.item("v_token_start"), case.item("n_visual")
    length = attention.shape[-1]
    index = torch.arange(start, start + number)
    text = torch.cat((torch.arange(start), torch.arange(start + number, length)))
    hidden = torch.zeros(length, 1)
    key = torch.zeros(number, dtype=torch.bool)
    key[case.tensor("key_set")] = True
    view = View(
        hidden[index],
        index,
        index,
        hidden[text],
        text,
        number,
        layer=3,
        ordinal=index - start,
        memory={"key": key},
        _seen={2: _Recorded(attention)},
    )
    method = MustDrop(
        global_threshold=case.item("global_thr"), individual_threshold=case.item("individual_thr")
    )
    total, peak = sum_and_peak(view, 2)
    important = attended(total, peak, method.global_threshold, method.individual_threshold)
    assert important.nonzero().flatten().tolist() == case.tensor("important").tolist()
    kept = method.filter(view).index[0]
    assert kept.tolist() == case.tensor("kept").tolist()
    # The next stage finds its key tokens by their ordinals: these are their places among the survivors.
    assert (
        key[view.ordinal[kept]].nonzero().flatten().tolist()
        == case.tensor("key_set_after").sort().values.tolist()
    )
