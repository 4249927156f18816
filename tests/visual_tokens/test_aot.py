"""AOT: plans that are optimal, and clips that keep what is new."""

from __future__ import annotations

import pytest
import torch

from zoo.engines.frames import windows_of
from zoo.engines.selection import local_then_global
from zoo.engines.transport import absorb_repetition, transport_into_anchors, transport_plan
from zoo.methods.visual_tokens.aot import AOT


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_plan_has_uniform_margins_and_is_the_scaling_of_the_kernel() -> None:
    cost = random(2, 12, 5).abs()
    plan = transport_plan(cost, rounds=2000, tolerance=1e-9)
    torch.testing.assert_close(plan.sum(1), torch.full((2, 5), 1 / 5))
    torch.testing.assert_close(plan.sum(2), torch.full((2, 12), 1 / 12))
    # Log-domain scaling, the other way to compute it, meets in the same place.
    for one, expected in zip(cost.double(), plan, strict=True):
        kernel = -one / 0.1
        row, column = torch.zeros(12, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        for _ in range(2000):
            row = -torch.logsumexp(kernel + column, 1) - torch.tensor(12.0).log()
            column = -torch.logsumexp(kernel + row.unsqueeze(1), 0) - torch.tensor(5.0).log()
        torch.testing.assert_close(
            (kernel + row.unsqueeze(1) + column).exp().float(), expected, atol=1e-5, rtol=1e-3
        )


def test_moving_into_anchors_is_the_formula_of_the_paper() -> None:
    x, side = random(1, 16, 6), 4
    anchors = torch.zeros(1, 16, dtype=torch.bool)
    anchors[0, [1, 6, 11]] = True
    places = [(row / 3, column / 3) for row in range(side) for column in range(side)]
    y, z = [1, 6, 11], [n for n in range(16) if n not in (1, 6, 11)]
    cosine = torch.tensor([[float(torch.cosine_similarity(x[0, a], x[0, b], dim=0)) for b in y] for a in z])
    distance = torch.tensor(
        [
            [((places[a][0] - places[b][0]) ** 2 + (places[a][1] - places[b][1]) ** 2) ** 0.5 for b in y]
            for a in z
        ]
    )
    plan = transport_plan(1 - cosine + 0.5 * distance)
    expected = []
    for number, anchor in enumerate(y):
        moved = sum(plan[i, number] * x[0, token] for i, token in enumerate(z))
        transported = (x[0, anchor] + moved) / (1 + plan[:, number].sum())
        joined = [x[0, token] for i, token in enumerate(z) if int(cosine[i].argmax()) == number]
        nearest = torch.stack([x[0, anchor], *joined]).mean(0)
        expected.append(0.9 * transported + 0.1 * nearest)
    weights = transport_into_anchors(x, anchors, (side, side))
    torch.testing.assert_close((weights @ x)[0], torch.stack(expected))
    torch.testing.assert_close(weights.sum(2), torch.ones(1, 3))


def test_frames_that_are_all_anchors_stay_as_they_are() -> None:
    weights = transport_into_anchors(random(2, 9, 4), torch.ones(2, 9, dtype=torch.bool), (3, 3))
    assert torch.equal(weights, torch.eye(9).expand(2, -1, -1))


def test_repetitions_are_absorbed_and_new_tokens_stay() -> None:
    first = torch.eye(12)[:8]
    later = first + 0.01 * random(8, 12)
    later[[2, 5]] = torch.eye(12)[[10, 11]]  # like nothing in the first frame
    weights, stayed = absorb_repetition([first, later], 0.25)
    assert stayed.tolist() == [8 + 2, 8 + 5]
    assert torch.equal(weights[:10], torch.eye(16)[[*range(8), 10, 13]])
    filled = weights[10:]
    torch.testing.assert_close(filled.sum(1), torch.ones(8))
    assert not filled[:, [10, 13]].any()
    inverted = [token for token in range(8, 16) if token not in (10, 13)]
    assert (filled[:, inverted].sum(0) > 0).all()


@pytest.mark.parametrize("lengths", [[4, 4], [4, 1], [3]], ids=str)
def test_every_output_has_a_place_of_its_own_in_its_clip(lengths: list[int]) -> None:
    frames, size = sum(lengths), 16
    mask = random(frames, size).abs() > 0.8
    mask[:, 0] = True
    x, unit = random(frames, size, 8, seed=1), torch.eye(size)
    method = AOT(clip=max(lengths))
    assert method.lengths(frames) == lengths
    values, mixes = [a[own] for a, own in zip(x, mask, strict=True)], [unit[own] for own in mask]
    place, matrix = method.weave(values, mixes, mask)
    assert len(place.unique()) == len(place) == len(matrix)
    clip = place // (size * max(lengths))
    assert clip.tolist() == sorted(clip.tolist())
    sources = (matrix > 0).view(len(matrix), frames, size).any(2).long()
    assert (sources.argmax(1) // max(lengths) == clip).all(), "no clip takes from another one"
    alone, _ = AOT(between_frames=False).weave(values, mixes, mask)
    assert alone.tolist() == mask.flatten().nonzero().squeeze(-1).tolist()


def test_a_clip_never_grows() -> None:
    x, mask = random(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    unit = list(torch.eye(9).expand(2, -1, -1))
    place, matrix = AOT(clip=2).weave(list(x), unit, mask)
    assert place.tolist() == list(range(18))
    assert torch.equal(matrix, torch.eye(18))


def test_anchors_are_the_best_of_each_window_and_then_of_all_others() -> None:
    shallow, deep = random(2, 36).abs(), random(2, 36, seed=1).abs()
    mask = local_then_global(shallow, deep, windows_of((6, 6), 3), 22, 11)
    for row, near, far in zip(mask, shallow, deep, strict=True):
        local = {
            max(
                ((2 * i + a) * 6 + 2 * j + b for a in range(2) for b in range(2)),
                key=lambda cell, near=near: float(near[cell]),
            )
            for i in range(3)
            for j in range(3)
        }
        others = sorted((n for n in range(36) if n not in local), key=lambda n, far=far: -float(far[n]))[:11]
        assert set(row.nonzero().squeeze(-1).tolist()) == local | set(others)


def test_the_paper_s_setting_follows_from_the_share() -> None:
    assert AOT().budget(32, 729, 0.125) == (126, 63)
    assert AOT(anchors_per_frame=108).budget(64, 729, 0.125) == (108, 54)
    assert AOT(between_frames=False).budget(32, 100, 0.2)[0] == 20
    assert AOT().budget(1, 100, 1.0)[0] == 100
    # Nine windows cannot share six anchors: the whole frame takes them, and none is lost.
    assert AOT().budget(8, 36, 0.25) == (12, 0)
    assert AOT(anchors_per_frame=12).budget(8, 36, 0.25) == (12, 6)
