import torch
from golden_cases import Case, golden
from transformers.models.llava_next.modeling_llava_next import unpad_image

from zoo.methods.visual_tokens.globalcom2 import tile_choices, tile_ratios, top_scores


@golden(
    "globalcom2",
    "base_cls_attention",
    "crop_cls_attention",
    "grid_side",
    "grid_w",
    "grid_h",
    "image_size_wh",
    "base_scale",
    "temperature",
    "scales",
    "crop_dims_wh",
    "kept_unpadded",
    "thumbnail_kept",
)
def selection(case: Case) -> None:
    side, across, down = (case.item(name) for name in ("grid_side", "grid_w", "grid_h"))
    share, base, crops = (
        case.item("base_scale"),
        case.tensor("base_cls_attention"),
        case.tensor("crop_cls_attention"),
    )
    assert top_scores(base, share).tolist() == case.tensor("thumbnail_kept").tolist()
    thumbnail = base.view(side, side)
    ratios = tile_ratios(thumbnail, (down, across), share, case.item("temperature"))
    torch.testing.assert_close(ratios, case.tensor("scales"), atol=1e-6, rtol=0)

    # Tile and score of every token, joined to one picture whose padding the model cuts off.
    tile = torch.arange(down * across).view(down, across)
    tile = tile.repeat_interleave(side, 0).repeat_interleave(side, 1)
    scores = crops.view(down, across, side, side).transpose(1, 2).reshape(down * side, across * side)
    width, height = case.tensor("image_size_wh").tolist()
    tile, scores = unpad_image(torch.stack((tile.to(scores), scores)), (height, width))
    area = tuple(tile.shape)
    for number, (columns, rows) in enumerate(case.tensor("crop_dims_wh").tolist()):
        found = (tile == number).nonzero()
        assert (found.max(0).values - found.min(0).values + 1).tolist() == [rows, columns]
    place = torch.stack(torch.meshgrid(*map(torch.arange, area), indexing="ij"), -1).flatten(0, 1)
    tile, scores = tile.flatten().long(), scores.flatten()
    chosen = tile_choices(thumbnail, scores, tile, place, area, ratios)
    for number, expected in enumerate(case.tensor("kept_unpadded").tolist()):
        # Numbers within the tile's own tokens, in raster order.
        own = (tile == number).long().cumsum(0) - 1
        assert own[chosen[number]].tolist() == [index for index in expected if index >= 0]
