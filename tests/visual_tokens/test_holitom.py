"""HoliTom against the plain reading of the paper: all segmentations, one merge after the other."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from zoo.engines.frames import redundant_segments
from zoo.methods.visual_tokens.holitom import HoliTom, pairwise_merge


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("longest", [1, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_segments_save_as_much_as_the_best_of_all_segmentations(seed: int, longest: int) -> None:
    frames = 7
    same = random(frames - 1, 9, seed=seed) > -0.8

    def saved(start: int, end: int) -> int:
        return int(same[start : end - 1].all(0).sum()) * (end - start - 1) if end - start > 1 else 0

    best = 0
    for number in range(frames):
        for cuts in combinations(range(1, frames), number):
            pieces = list(pairwise((0, *cuts, frames)))
            if all(end - start <= longest for start, end in pieces):
                best = max(best, sum(saved(*piece) for piece in pieces))
    pieces, total = redundant_segments(same, longest)
    assert total == best == sum(saved(start, end + 1) for start, end in pieces)
    assert [frame for start, end in pieces for frame in range(start, end + 1)] == list(range(frames))


def test_pairwise_merge_is_the_running_average_of_the_release() -> None:
    x, attention = random(23, 8), random(23, seed=1).exp()
    top = attention.topk(6).indices.sort().values.tolist()
    expected = x.clone()
    for token in range(len(x)):
        if token not in top:
            target = max(top, key=lambda t: float(torch.cosine_similarity(x[t], x[token], dim=0)))
            expected[target] = (expected[target] + expected[token]) / 2
    merge = pairwise_merge(x, attention, 6)
    assert merge.anchor[0].tolist() == top
    torch.testing.assert_close(merge.apply(x.unsqueeze(0))[0], expected[top])
    # bfloat16 holds the weights, which are powers of two, exactly.
    half = merge.apply(x.bfloat16().unsqueeze(0))[0]
    torch.testing.assert_close(half.float(), expected[top], rtol=0.05, atol=0.05)


def test_still_places_are_averaged_over_time_and_moving_ones_kept_by_attention() -> None:
    frames, number, share = 6, 20, 0.4
    still, moving = range(5, 20), range(5)
    features = random(1, number, 12).repeat(frames, 1, 1) + 0.01 * random(frames, number, 12, seed=1)
    features[:, moving] = random(frames, 5, 12, seed=2)
    attention = random(frames, number, seed=3).exp()
    method = HoliTom()
    place, matrix = method.weave(features, attention, share)
    # 6 * 20 tokens without the 15 * 5 that repeat: the budget goes to what is left.
    rest = share / (45 / 120)
    assert rest > 1 or len(place) <= share * frames * number + frames
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(place)))
    static = place[: round(15 * min(rest, 1))]
    assert set(static.tolist()) <= set(still)
    spread = matrix[0].view(frames, number)
    assert (spread.sum(1) > 0).all(), "a static token holds a part of every frame"
    assert not spread[:, moving].any()


@pytest.mark.parametrize("contextual", [0.0, 0.5])
def test_moving_tokens_stay_in_order_and_the_budget_is_met(contextual: float) -> None:
    frames, number = 3, 30
    features, attention = random(frames, number, 16), random(frames, number, seed=1).exp()
    place, matrix = HoliTom(contextual_ratio=contextual).weave(features, attention, 0.2)
    assert len(place) == frames * 6
    assert place.tolist() == sorted(set(place.tolist()))
    if contextual == 0:
        for frame, kept in enumerate(place.view(frames, 6) - number * torch.arange(frames).unsqueeze(1)):
            assert set(kept.tolist()) == set(attention[frame].topk(6).indices.tolist())
            assert attention[frame, kept].sum() > attention[frame].topk(6, largest=False).values.sum()
        assert torch.equal(matrix.argmax(1), place)
    else:
        assert ((matrix > 0).sum(1) > 1).any(), "contextual tokens take others in"


def test_an_isolated_centre_keeps_its_value_and_others_weigh_by_beta() -> None:
    x = torch.cat((torch.full((1, 4), 2.0), 0.1 * random(9, 4)))
    centres, mix = HoliTom(centre_weight=0.6).cluster(x, 3)
    assert 0 in centres.tolist()
    member = torch.cdist(x, x[centres]).argmin(1)
    for number, centre in enumerate(centres.tolist()):
        others = [i for i in range(10) if member[i] == number and i != centre]
        assert (centre == 0) == (not others)
        expected = 0.6 * x[centre] + 0.4 * x[others].mean(0) if others else x[centre]
        torch.testing.assert_close(mix[number] @ x, expected)
