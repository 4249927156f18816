import pytest
import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.dycoke import DyCoke, Gate, temporal_order


@golden("dycoke", "features", "num_frames", "tokens_per_frame", "k", "out_features", "source_index")
def temporal_merging(case: Case) -> None:
    features, size = case.tensor("features"), case.item("tokens_per_frame")
    frames = features.view(case.item("num_frames"), size, -1)
    order = temporal_order(frames, DyCoke(keep_ratio=1 - case.item("k")).kept_of_frame(size))
    assert order.tolist() == case.tensor("source_index").tolist()
    torch.testing.assert_close(features[order], case.tensor("out_features"), rtol=0, atol=0)


@golden("dycoke", "attn_last_row", "image_start", "num_image_tokens", "first_step_len", "p", "key_keep_mask")
def reading(case: Case) -> None:
    rows, first = case.tensor("attn_last_row"), case.item("first_step_len")
    start, number = case.item("image_start"), case.item("num_image_tokens")
    gate = Gate(read_ratio=1 - case.item("p"))
    for step, row in enumerate(rows):
        length = first + step
        visible = torch.zeros(rows.shape[-1], dtype=torch.bool)
        visible[:length] = True
        read = gate(row[:, start : start + number].mean(0))
        if read is not None:
            visible[start : start + number] = read
        assert visible.tolist() == case.tensor("key_keep_mask")[step].tolist()
        assert gate.similarity == pytest.approx(case.tensor("similarity")[step].item(), rel=1e-5, abs=1e-6)
