import torch
from golden_cases import Case, golden

from zoo.engines.frames import redundant_segments, weave
from zoo.methods.visual_tokens.holitom import HoliTom, pairwise_merge, remaining_share


@golden(
    "holitom",
    "features",
    "frame_attn",
    "retain_ratio",
    "newline_mode",
    "image_newline",
    "segments",
    "out_features",
)
def before_the_llm(case: Case) -> None:
    features, attention = case.tensor("features"), case.tensor("frame_attn")
    frames, number, width = features.shape
    method = HoliTom(
        keep_ratio=case.item("retain_ratio"),
        static_threshold=case.item("tau"),
        centre_weight=case.item("beta"),
        contextual_ratio=case.item("D"),
        neighbours=case.item("K"),
        longest=case.item("max_window"),
    )
    same = torch.cosine_similarity(features[:-1], features[1:], dim=-1) > method.static_threshold
    pieces, reduced = redundant_segments(same, method.longest)
    assert [list(piece) for piece in pieces] == case.tensor("segments").tolist()
    assert reduced == case.item("total_reduced")
    assert remaining_share(method.keep_ratio, frames * number, reduced) == case.item("effective_ratio")

    # With newlines the sequence is laid out as the language model gets it: one behind each row of each frame.
    columns = round(number**0.5)
    cells = torch.arange(frames * number)
    width_of_row = columns + case.item("newline_mode")
    place = cells // columns * width_of_row + cells % columns
    whole = case.tensor("image_newline").repeat(frames * (number // columns) * width_of_row, 1)
    whole[place] = features.view(-1, width)
    film = place.view(frames, number)
    reduction = weave(len(whole), [film], [method.weave(features, attention, method.keep_ratio)])
    torch.testing.assert_close(
        reduction.apply(whole.unsqueeze(0))[0], case.tensor("out_features"), rtol=0, atol=1e-5
    )
    frame_of = reduction.anchor[0] // (number // columns * width_of_row)
    counts = [int(((frame_of >= start) & (frame_of <= end)).sum()) for start, end in pieces]
    assert counts == case.tensor("tokens_per_segment").tolist()


@golden("holitom", "attn_last_row", "hidden_states", "image_start", "num_image_tokens", "r", "out_hidden")
def inside_the_llm(case: Case) -> None:
    hidden, attention = case.tensor("hidden_states"), case.tensor("attn_last_row")
    start, number = case.item("image_start"), case.item("num_image_tokens")
    kept = round(number * HoliTom(inner_keep_ratio=1 - case.item("r")).inner_keep_ratio)
    assert kept == case.item("num_keep")
    visual = slice(start, start + number)
    merge = pairwise_merge(hidden[visual], attention.mean(0)[visual], kept)
    middle = merge.apply(hidden[visual].unsqueeze(0))[0]
    out = torch.cat((hidden[:start], middle, hidden[start + number :]))
    torch.testing.assert_close(out, case.tensor("out_hidden"), rtol=0, atol=1e-5)
    behind = torch.arange(start + number, len(hidden))
    places = torch.cat((torch.arange(start), merge.anchor[0] + start, behind))
    assert places.tolist() == case.tensor("position_ids").tolist()
