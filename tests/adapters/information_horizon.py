import torch
from golden_cases import Case, golden

from zoo.methods.visual_tokens._token_information import (
    Information,
    answer_probability,
    most_informative,
    windows,
)
from zoo.methods.visual_tokens.information_horizon import random_choice


@golden("information-horizon", "grid", "size", "xy_1based", "token_ids")
def window_places(case: Case) -> None:
    grid, size = case.item("grid"), case.item("size")
    found = windows(grid, grid, size)
    # The case names each window by its place, so it may list them in any order.
    down = grid // size
    numbers = [(x - 1) * down + y - 1 for x, y in case.tensor("xy_1based").tolist()]
    assert [found[number].tolist() for number in numbers] == case.tensor("token_ids").tolist()


@golden(
    "information-horizon",
    "size",
    "window_logits",
    "text_only_logits",
    "gt_label",
    "save_num",
    "image_start",
    "seq_len",
    "p_keep_only",
    "information",
    "kept_sequence_indices",
)
def ranking(case: Case) -> None:
    logits, size, label = case.tensor("window_logits"), case.item("size"), case.item("gt_label")
    across, down = logits.shape[:2]
    alone = torch.zeros(across * down * size * size, dtype=torch.float64)
    values = answer_probability(logits.flatten(0, 1), label)
    for group, value in zip(windows(down * size, across * size, size), values, strict=True):
        alone[group] = value
    without = answer_probability(case.tensor("text_only_logits"), label)
    torch.testing.assert_close(alone, case.tensor("p_keep_only").double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(without, case.tensor("p_text").double(), rtol=1e-6, atol=1e-9)
    information = Information((1,), alone.unsqueeze(0), without.reshape(1))
    torch.testing.assert_close(information.gain[0], case.tensor("information").double(), rtol=1e-5, atol=1e-9)
    start, length = case.item("image_start"), case.item("seq_len")
    kept = most_informative(alone, case.item("save_num")) + start
    sequence = [*range(start), *kept.tolist(), *range(start + len(alone), length)]
    assert sequence == case.tensor("kept_sequence_indices").tolist()


@golden(
    "information-horizon",
    "python_random_seed",
    "num_visual",
    "keep",
    "image_start",
    "seq_len",
    "kept_sequence_indices",
    "new_position_ids",
)
def random_stage(case: Case) -> None:
    number, start, length = (case.item(name) for name in ("num_visual", "image_start", "seq_len"))
    kept = random_choice(number, case.item("keep"), case.item("python_random_seed")).sort().values + start
    sequence = [*range(start), *kept.tolist(), *range(start + number, length)]
    assert sequence == case.tensor("kept_sequence_indices").tolist()
    assert list(range(len(sequence))) == case.tensor("new_position_ids").tolist()
