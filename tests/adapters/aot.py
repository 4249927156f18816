import torch
from golden_cases import Case, golden

from zoo.engines.frames import windows_of
from zoo.engines.selection import local_then_global
from zoo.engines.transport import transport_into_anchors
from zoo.methods.visual_tokens.aot import AOT


def side_of(number: int) -> int:
    return round(number**0.5)


@golden("aot", "attn_shallow", "attn_deep", "visual_token_num", "global_ratio", "window", "index_mask")
def anchors(case: Case) -> None:
    shallow = case.tensor("attn_shallow")
    side = side_of(shallow.shape[1])
    windows = windows_of((side, side), side // case.item("window"))
    method = AOT(anchors_per_frame=case.item("visual_token_num"), global_ratio=case.item("global_ratio"))
    count, local = method.budget(len(shallow), side * side, method.keep_ratio)
    mask = local_then_global(shallow, case.tensor("attn_deep"), windows, count, local)
    assert mask.tolist() == case.tensor("index_mask").tolist()


@golden("aot", "features", "index_mask", "out_anchors")
def within_a_frame(case: Case) -> None:
    features, mask = case.tensor("features"), case.tensor("index_mask")
    side = side_of(len(features))
    mix = transport_into_anchors(features.unsqueeze(0), mask.unsqueeze(0), (side, side))
    torch.testing.assert_close(mix[0] @ features, case.tensor("out_anchors"), rtol=0, atol=1e-4)


@golden("aot", "features", "index_mask", "segment_lengths", "keep_ratio", "scaling", "out_features")
def between_frames(case: Case) -> None:
    features, mask = case.tensor("features"), case.tensor("index_mask")
    lengths = case.tensor("segment_lengths").tolist()
    start, out = 0, []
    unit = torch.eye(mask.shape[1])
    for length in lengths:
        own = slice(start, start + length)
        method = AOT(new_ratio=case.item("keep_ratio"), clip=length, moved_weight=case.item("scaling"))
        anchors = [x[kept] for x, kept in zip(features[own], mask[own], strict=True)]
        place, matrix = method.weave(anchors, [unit[kept] for kept in mask[own]], mask[own])
        assert len(place.unique()) == len(place)
        out.append(matrix @ features[own].flatten(0, 1))
        start += length
    torch.testing.assert_close(torch.cat(out), case.tensor("out_features"), rtol=0, atol=1e-4)
