import torch
from golden_cases import Case, golden

from zoo.engines.segments import arrange
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.sparsevlm import SparseVLM, raters


class _Recorded:
    """Stands where the attention tap stands, with the text rows that the official code saw."""

    def __init__(self, attention: torch.Tensor) -> None:
        self.attention = attention

    def received(self, sample: int, index: torch.Tensor) -> torch.Tensor:
        return self.attention[:, index - self.attention.shape[-1]].sum(1)


@golden(
    "sparsevlm",
    "embeddings",
    "attn_text_rows",
    "hidden_states",
    "counts",
    "layer",
    "rater_index",
    "keep_mask",
    "merged_tokens",
    "out_hidden",
)
def selection(case: Case) -> None:
    hidden, embeddings = case.tensor("hidden_states"), case.tensor("embeddings")
    start, number, layer = (case.item(name) for name in ("image_start", "num_image_tokens", "layer"))
    counts = case.tensor("counts").tolist()
    index = torch.arange(start, start + number)
    text = torch.cat((torch.arange(start), torch.arange(start + number, len(hidden))))
    view = View(
        tokens=hidden[index],
        index=index,
        original=index,
        text=hidden[text],
        text_index=text,
        total=number,
        layer=layer + 1,
        _seen={layer: _Recorded(case.tensor("attn_text_rows"))},
        _hidden={(0, "input"): embeddings.unsqueeze(0)},
    )
    chosen = raters(embeddings[index], embeddings[start + number :])
    assert chosen.tolist() == case.tensor("rater_index").tolist()
    view.memory["raters"] = chosen
    method = SparseVLM(counts=counts)
    stage = (2, 6, 15).index(layer)

    seen: list[torch.Tensor] = []

    class Spy(SparseVLM):
        def cluster(
            self, tokens: torch.Tensor, scores: torch.Tensor, count: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(scores)
            return super().cluster(tokens, scores, count)

    reduction = Spy(counts=counts).select(stage, False, view)
    torch.testing.assert_close(seen[0], case.tensor("visual_scores"), rtol=1e-5, atol=1e-6)
    into = reduction.assignment[0]
    staying = reduction.length - case.item("num_clusters")
    kept = case.tensor("keep_mask")
    assert staying == int(kept.sum()) == min(method.count(stage, number), number - 1)
    assert torch.equal((into >= 0) & (into < staying), kept)
    assert int((into >= staying).sum()) == case.item("recycle_candidates")
    row = arrange(reduction, view)
    out = hidden[row.place]
    assert row.combine is not None
    out[row.visual] = row.combine(view.tokens)
    torch.testing.assert_close(out, case.tensor("out_hidden"), rtol=1e-5, atol=1e-5)
    merged = reduction.apply(view.tokens.unsqueeze(0))[0, staying:]
    torch.testing.assert_close(merged, case.tensor("merged_tokens"), rtol=1e-5, atol=1e-5)
