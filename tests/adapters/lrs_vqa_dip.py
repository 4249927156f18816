import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.lrs_vqa_dip import LrsVqaDip, tiles_hit


@golden("lrs-vqa-dip", "attn", "grid_h", "grid_w_with_newline", "keep_ratio", "valid_mask", "selected_index")
def tokens_and_tiles(case: Case) -> None:
    rows, columns = case.item("grid_h"), case.item("grid_w_with_newline")
    attention, valid = case.tensor("attn"), case.tensor("valid_mask").bool()
    newline = torch.arange(rows * columns) % columns == columns - 1
    kept = LrsVqaDip(keep_ratio=case.item("keep_ratio")).chosen(attention, newline, valid)
    assert kept.tolist() == case.tensor("selected_index").tolist()
    if "selected_index_threshold02" in case:
        above = LrsVqaDip(threshold=0.2).chosen(attention, newline, valid)
        assert above.tolist() == case.tensor("selected_index_threshold02").tolist()
    if "selected_tiles" in case:
        down, across = case.tensor("next_tiles_hw").tolist()
        hit = tiles_hit(kept, (rows, columns), (down, across))
        assert hit.tolist() == case.tensor("selected_tiles").tolist()
