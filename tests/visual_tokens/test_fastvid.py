"""FastVID against a plain loop over frames and tokens."""

from __future__ import annotations

import pytest
import torch

from zoo.methods.visual_tokens.fastvid import FastVID


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(
    method: FastVID, x: torch.Tensor, lengths: list[int], attention: torch.Tensor, share: float
) -> dict[int, torch.Tensor]:
    """Place -> new token, as the paper tells it."""
    number = x.shape[1]
    both = int(number * share)
    context = int(both * method.context_ratio)
    out: dict[int, torch.Tensor] = {}
    others: list[list[int]] = []
    for frame, row in enumerate(attention.tolist()):
        ranked = sorted(range(number), key=lambda place, row=row: -row[place])
        for place in ranked[: both - context]:
            out[frame * number + place] = x[frame, place]
        others.append(sorted(ranked[both - context :]))
    start = 0
    for length in lengths:
        own = range(start, start + length)
        holders = [frame for frame in own if (start + length - 1 - frame) % method.stride == 0]
        members = [(frame, place) for frame in own for place in others[frame]]
        for frame in holders:
            points = x[frame, others[frame]]
            distance = (
                torch.tensor([[float((a - b).norm()) for b in points] for a in points]) / x.shape[2] ** 0.5
            )
            density = [
                float((-row.sort().values[: method.neighbours].square().mean()).exp()) for row in distance
            ]
            score = []
            for i, row in enumerate(distance.tolist()):
                denser = [row[j] for j in range(len(row)) if density[j] > density[i]]
                score.append(density[i] * (min(denser) if denser else float(distance.max())))
            best = sorted(range(len(score)), key=lambda i: -score[i])[: context * length // len(holders)]
            anchors = [others[frame][i] for i in best]
            joined: dict[int, list[torch.Tensor]] = {anchor: [] for anchor in anchors}
            for at, place in members:
                token = x[at, place]
                nearest = max(
                    anchors, key=lambda a: float(torch.cosine_similarity(x[frame, a], token, dim=0))
                )
                joined[nearest].append(token)
            for anchor, tokens in joined.items():
                weight = max(method.anchor_weight, 1 / (len(tokens) + 1))
                mean = torch.stack(tokens).mean(0)
                out[frame * number + anchor] = weight * x[frame, anchor] + (1 - weight) * mean
        start += length
    return out


@pytest.mark.parametrize("lengths", [[6], [1, 5], [2, 1, 3]], ids=str)
def test_weights_are_those_of_the_plain_loop(lengths: list[int]) -> None:
    method = FastVID(stride=2)
    x, attention = random(6, 20, 9), random(6, 20, seed=1).exp()
    place, matrix = method.weave(x, lengths, attention, 0.4)
    expected = plain(method, x, lengths, attention, 0.4)
    assert place.tolist() == sorted(expected)
    out = matrix @ x.flatten(0, 1)
    torch.testing.assert_close(out, torch.stack([expected[number] for number in sorted(expected)]))


def test_the_budget_is_met_and_salient_tokens_stay_untouched() -> None:
    method = FastVID()
    x, attention = random(8, 30, 6), random(8, 30, seed=1).exp()
    for share in (0.1, 0.34, 0.8):
        place, matrix = method.weave(x, [4, 4], attention, share)
        assert len(place) <= 8 * int(30 * share)
        salient, _ = method.budgets(30, share)
        for frame, row in enumerate(attention):
            for token in row.topk(salient).indices.tolist():
                index = place.tolist().index(frame * 30 + token)
                assert matrix[index].nonzero().tolist() == [[frame * 30 + token]]
            least = row.topk(salient, largest=False).values.sum()
            assert row.topk(salient).values.sum() > least


def test_videos_are_cut_where_they_change() -> None:
    scene = random(3, 16)
    frames = torch.cat((scene[0].repeat(4, 1), scene[1].repeat(2, 1), scene[2].repeat(5, 1)))
    frames = frames + 0.01 * random(11, 16, seed=1)
    assert FastVID(segments=1).lengths(frames) == [4, 2, 5]
    assert FastVID(segments=3, threshold=-1).lengths(frames) == [4, 2, 5]
    assert FastVID(segments=100, threshold=-1).lengths(frames) == [1] * 11
    assert FastVID().lengths(frames[:1]) == [1]
