import torch
from golden_cases import Case, golden

from zoo.engines.segments import arrange
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.fastv import FastV, visual_scores


class _Recorded:
    """Stands where the attention tap stands, with the rows that the official code saw."""

    def __init__(self, attention: torch.Tensor) -> None:
        self.attention = attention

    def rows(self, sample: int, index: torch.Tensor) -> torch.Tensor:
        length = self.attention.shape[-1]
        return self.attention[sample][:, index - length]


@golden(
    "fastv", "last_rows_attn", "hidden_in", "sys_length", "image_length", "attention_rank", "keep_indices"
)
def selection(case: Case) -> None:
    hidden, attention = case.tensor("hidden_in"), case.tensor("last_rows_attn")
    start, number, kept = (case.item(name) for name in ("sys_length", "image_length", "attention_rank"))
    index = torch.arange(start, start + number)
    length = hidden.shape[1]
    text = torch.tensor([place for place in range(length) if not start <= place < start + number])
    view = View(
        tokens=hidden[0, index],
        index=index,
        original=index,
        text=hidden[0, text],
        text_index=text,
        total=number,
        layer=2,
        _seen={1: _Recorded(attention)},
    )
    method = FastV(keep_tokens=kept)
    scores = visual_scores(view.attention(1, view.last)[:, 0], view.index)
    torch.testing.assert_close(scores, case.tensor("image_scores"))
    assert (method.order(scores) + start).tolist() == case.tensor("topk_order").tolist()
    row = arrange(method.select(view), view)
    assert row.place.tolist() == case.tensor("keep_indices").tolist()
    torch.testing.assert_close(hidden[:, row.place], case.tensor("hidden_out"), rtol=0, atol=0)
    assert row.place.tolist() == case.tensor("position_ids")[0].tolist()
