from __future__ import annotations

import torch
from golden_cases import Case, golden

from zoo.engines.attention_mass import removable, removable_by_both, strongest_received
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.fitprune import FitPrune, least_attended


class _Recorded:
    """Stands where the attention tap stands, with the map that the official code saw."""

    def __init__(self, attention: torch.Tensor) -> None:
        self.attention = attention

    def rows(self, sample: int, index: torch.Tensor) -> torch.Tensor:
        return self.attention[:, index]


def view_of(case: Case) -> View:
    attention, start, number = case.tensor("attn"), case.item("n_system"), case.item("n_visual")
    length = attention.shape[-1]
    index = torch.arange(start, start + number)
    text = torch.cat((torch.arange(start), torch.arange(start + number, length)))
    hidden = torch.zeros(length, 1)
    return View(
        hidden[index], index, index, hidden[text], text, number, layer=1, _seen={0: _Recorded(attention)}
    )


@golden("fitprune", "attn", "n_system", "n_visual", "n_delete", "cross", "self_attn", "deleted", "keep_mask")
def deletion(case: Case) -> None:
    view, count = view_of(case), case.item("n_delete")
    cross, mutual = strongest_received(view, 0)
    torch.testing.assert_close(cross, case.tensor("cross"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mutual, case.tensor("self_attn"), rtol=1e-5, atol=1e-5)
    assert least_attended(cross, mutual, count)[0].tolist() == case.tensor("deleted").tolist()
    counts = (count,)
    reduction = FitPrune(counts=counts, fitted_on=view.total).select(counts, view)
    mask = torch.zeros_like(case.tensor("keep_mask"))
    mask[view.text_index] = True
    mask[view.index[reduction.index[0]]] = True
    assert torch.equal(mask, case.tensor("keep_mask"))


@golden("fitprune", "attn", "alpha", "ref_cross_sum", "ref_self_sum", "del_cross", "del_self", "deleted")
def fitting(case: Case) -> None:
    view, alpha = view_of(case), case.item("alpha")
    cross, mutual = strongest_received(view, 0)
    cross = cross / int((view.text_index > view.index.max()).sum())
    floors = (case.item("ref_cross_sum") * (1 - alpha), case.item("ref_self_sum") * (1 - alpha))
    assert removable(cross, floors[0]).tolist() == case.tensor("del_cross").tolist()
    assert removable(mutual, floors[1]).tolist() == case.tensor("del_self").tolist()
    assert removable_by_both(cross, mutual, floors).tolist() == case.tensor("deleted").tolist()
