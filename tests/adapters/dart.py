import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens.dart import DART, key_strength, strongest


@golden(
    "dart",
    "hidden_normed",
    "key_states",
    "image_start",
    "image_length",
    "pivot_image",
    "pivot_text",
    "save_num",
    "pivot_order",
    "kept_indices",
)
def selection(case: Case) -> None:
    hidden, keys = case.tensor("hidden_normed")[0], case.tensor("key_states")[0]
    start, number = case.item("image_start"), case.item("image_length")
    method = DART(
        keep_tokens=case.item("save_num"),
        image_pivots=case.item("pivot_image"),
        text_pivots=case.item("pivot_text"),
    )
    strength = key_strength(keys)
    image = strongest(strength[start : start + number], method.image_pivots)
    text = strongest(strength[start + number :], method.text_pivots)
    assert (image + start).tolist() == case.tensor("image_pivots").tolist()
    assert (text + start + number).tolist() == case.tensor("text_pivots").tolist()
    order = case.tensor("pivot_order")
    assert set(order.tolist()) == {*(image + start).tolist(), *(text + start + number).tolist()}
    kept = method.retained(hidden[start : start + number], hidden[order], image)
    assert method.per_pivot(number, len(image), len(order)) == case.item("topk_per_pivot")
    assert (kept.sort().values + start).tolist() == case.tensor("kept_indices").tolist()
    assert len(kept) == method.count(number)
    assert torch.equal(kept[: len(image)], image)
