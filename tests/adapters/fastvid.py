import torch
from golden_cases import Case, golden

from zoo.engines.frames import weave
from zoo.methods.visual_tokens.fastvid import FastVID


@golden(
    "fastvid",
    "hidden_states",
    "frame_global_features",
    "frame_attention",
    "video_start",
    "kept_positions",
    "output",
)
def before_the_llm(case: Case) -> None:
    hidden, attention = case.tensor("hidden_states"), case.tensor("frame_attention")
    start, frames, number = (case.item(name) for name in ("video_start", "n_frames", "tokens_per_frame"))
    method = FastVID(
        keep_ratio=case.item("retention_ratio"),
        segments=case.item("dyseg_c"),
        threshold=case.item("dyseg_tau"),
        context_ratio=case.item("stprune_d"),
        stride=case.item("dtm_p"),
        anchor_weight=case.item("dtm_beta"),
    )
    lengths = method.lengths(case.tensor("frame_global_features"))
    assert lengths == case.tensor("segment_sizes").tolist()
    salient, context = method.budgets(number, method.keep_ratio)
    assert method.contexts(lengths, context) == case.tensor("context_per_frame").tolist()
    top = attention.topk(salient).indices
    assert top.tolist() == case.tensor("salient_indices").tolist()

    features = hidden[start : start + frames * number].view(frames, number, -1)
    others = torch.ones_like(attention, dtype=torch.bool).scatter(1, top, False)
    score = method.density(features[others].view(frames, number - salient, -1))
    torch.testing.assert_close(score, case.tensor("density_score"), rtol=1e-5, atol=1e-5)

    # All tokens of the sequence but the video's stay, which is what happens to tokens outside of a film.
    film = torch.arange(start, start + frames * number).view(frames, number)
    place, matrix = method.weave(features, lengths, attention, method.keep_ratio)
    whole = weave(frames * number, [film - start], [(place, matrix)])
    text = [torch.arange(start), torch.arange(start + frames * number, len(hidden))]
    places = torch.cat((text[0], whole.anchor[0] + start, text[1]))
    assert places.tolist() == case.tensor("kept_positions").tolist()
    visual = whole.apply(features.view(1, frames * number, -1))[0]
    out = torch.cat((hidden[text[0]], visual, hidden[text[1]]))
    torch.testing.assert_close(out, case.tensor("output"), rtol=0, atol=1e-5)
