import torch
from golden_cases import Case, golden

from zoo.engines.tokens import View
from zoo.methods.visual_tokens.adaptinfer import COUNTS, LAYERS, AdaptInfer, text_guided_scores


class _Recorded:
    """Stands where the attention tap stands, with the text rows that the official code saw."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.recorded = rows

    def rows(self, sample: int, index: torch.Tensor) -> torch.Tensor:
        return self.recorded[:, index - (self.recorded.shape[-1] - self.recorded.shape[1])]


@golden(
    "adaptinfer",
    "attn_text_rows",
    "image_start",
    "num_image_tokens",
    "num_text",
    "layer",
    "budget",
    "num_keep",
    "visual_scores",
    "keep_mask",
)
def one_cut(case: Case) -> None:
    recorded = _Recorded(case.tensor("attn_text_rows"))
    start, number, layer = (case.item(name) for name in ("image_start", "num_image_tokens", "layer"))
    length = recorded.recorded.shape[-1]
    index = torch.arange(start, start + number)
    text = torch.cat((torch.arange(start), torch.arange(start + number, length)))
    tokens = torch.zeros(length, 1)
    view = View(tokens[index], index, index, tokens[text], text, number, layer + 1, _seen={layer: recorded})
    assert len(view.question) == case.item("num_text")
    scores = text_guided_scores(lambda rows: view.attention(layer, rows), view.question, view.index)
    torch.testing.assert_close(scores, case.tensor("visual_scores"), rtol=1e-5, atol=0)
    kept = AdaptInfer(counts=COUNTS[case.item("budget")]).select(LAYERS.index(layer), view)
    assert kept.length == case.item("num_keep")
    assert kept.index[0].tolist() == case.tensor("keep_mask").nonzero().squeeze(-1).tolist()
