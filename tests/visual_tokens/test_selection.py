"""The greedy rules that several methods share, beside plain translations of their definitions."""

import pytest
import torch

from zoo.engines import selection as rules


def vectors(kind: str, size: int, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, width, generator=generator)
    if kind == "clusters":
        x = x[torch.randint(max(1, size // 20), (size,), generator=generator)] + 0.5 * x
    elif kind == "smooth":  # neighbours are alike, as in a picture
        x = x.cumsum(0)
    elif kind == "zeros":
        x[::7] = 0
    elif kind == "twins":
        x[size // 2 :] = x[: size - size // 2].clone()
    return x


def distances(x: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(x)
    return 1 - unit @ unit.T


def plain_max_min(x: torch.Tensor, count: int) -> list[int]:
    matrix = distances(x)
    picked = [int(matrix.clone().fill_diagonal_(torch.inf).amin(0).argmax())]
    while len(picked) < count:
        gap = matrix[picked].amin(0)
        gap[picked] = -torch.inf
        picked.append(int(gap.argmax()))
    return picked


@pytest.mark.parametrize("kind", ["plain", "clusters", "smooth", "zeros"])
@pytest.mark.parametrize("size", [2, 63, 300, 900])
def test_max_min_diversity(kind: str, size: int) -> None:
    x = vectors(kind, size)
    count = min(size, 40)
    assert rules.farthest_points(x, count).tolist() == plain_max_min(x, count)


def test_max_min_of_one_vector() -> None:
    assert rules.farthest_points(torch.randn(1, 8), 1).tolist() == [0]
    assert rules.farthest_points(torch.randn(5, 8), 0).tolist() == []


def test_every_row_is_picked_once() -> None:
    x = vectors("plain", 20)[torch.zeros(300, dtype=torch.long)]
    assert rules.farthest_points(x, 300).sort().values.tolist() == list(range(300))


@pytest.mark.parametrize("size", [40, 601, 1443])
def test_a_lonely_pair_is_one_tie(size: int) -> None:
    """Two rows far from all others are each other's nearest: the first of them is the most isolated one."""
    generator = torch.Generator().manual_seed(size)
    for _ in range(10):
        x = torch.ones(size, 32) + 0.1 * torch.randn(size, 32, generator=generator)
        pair = torch.randperm(size, generator=generator)[:2]
        x[pair] = torch.randn(2, 32, generator=generator) - 1
        assert int(rules.most_isolated(rules.Cosines(x))) == int(pair.min())


@pytest.mark.parametrize("size", [575, 1443])
def test_equal_vectors_tie(size: int) -> None:
    """Of two equal vectors the first is picked, also where kernels treat the last rows of an odd number apart."""
    x = vectors("twins", size, 1152)
    cosines = rules.Cosines(x)
    half = size // 2
    for index in range(0, size, 100):
        row = cosines.row(torch.tensor(index))
        assert torch.equal(row[half : 2 * half], row[:half])
    picked = rules.farthest_points(x, half)
    assert int(picked[0]) == size - 1  # the only row without a twin
    assert int(picked[1:].max()) < half


@pytest.mark.parametrize("size", [1, 200, 256, 700])
def test_half_a_matrix_is_the_whole(size: int) -> None:
    x = vectors("zeros", size)
    matrix = rules.cosine_matrix(x)
    torch.testing.assert_close(matrix, 1 - distances(x))
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("kind", ["plain", "clusters"])
def test_coverage(kind: str) -> None:
    x = vectors(kind, 400)
    weight = torch.rand(400, generator=torch.Generator().manual_seed(1))
    cosines, covered = 1 - distances(x), torch.zeros(400)
    picked: list[int] = []
    for _ in range(30):
        score = (cosines - covered).clamp(min=0).sum(1) * weight
        score[picked] = -torch.inf
        picked.append(int(score.argmax()))
        covered = torch.maximum(covered, cosines[picked[-1]])
    assert rules.most_covering(x, weight, 30).tolist() == picked
