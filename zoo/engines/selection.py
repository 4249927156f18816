"""Choosing a subset of vectors: greedy rules that several methods share.

Pure tensor functions on one sample. Distances are float32 whatever the model's type: half precision loses the order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_BLOCK = 256
"""Rows that are multiplied at once where a whole matrix is not needed, or not wanted in one piece."""
_ROUNDING = 1e-5
"""More than what the order of summation changes in a cosine: products of other shapes differ in the last digits."""


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of ``x [N, D]`` divided by their length, float32. A zero row stays zero."""
    x = x.float()
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.where(norm > 0, 1.0)


def cosine_matrix(x: torch.Tensor) -> torch.Tensor:
    """Cosines between all rows of ``x [N, D]``, ``[N, N]`` float32. It is symmetric: only one half is computed."""
    unit = unit_rows(x)
    matrix = unit.new_empty(len(unit), len(unit))
    for start in range(0, len(unit), _BLOCK):
        block, below = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        matrix[block, start:] = unit[block] @ unit[start:].T
        matrix[below, block] = matrix[block, below].T
    return matrix


def cosine_distances(x: torch.Tensor) -> torch.Tensor:
    """``1 - cos`` between the rows of ``x [N, D]``, ``[N, N]`` float32. A zero row is at distance 1 of everything."""
    return 1.0 - cosine_matrix(x)


class Cosines:
    """Cosines of some rows of ``x [N, D]`` with all rows, when they are asked for: O(N D) each, and no matrix.

    Attributes:
        unit: the rows divided by their length, ``[N, D]`` float32.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.unit = unit_rows(x)
        # In this layout every sum of a product runs in the same order: equal vectors get equal cosines, and tie.
        self._columns = self.unit.T.contiguous()

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Cosines of rows ``index [R]`` with all rows, ``[R, N]`` float32."""
        return self.unit[index] @ self._columns

    def row(self, index: torch.Tensor) -> torch.Tensor:
        """Cosines of row ``index []`` with all rows, ``[N]`` float32."""
        return self.rows(index.reshape(1))[0]

    def distances(self, index: torch.Tensor) -> torch.Tensor:
        """``1 - cos`` of row ``index []`` to all rows, ``[N]`` float32."""
        return 1.0 - self.row(index)


def most_isolated(cosines: Cosines) -> torch.Tensor:
    """The row whose nearest other row, by cosine distance, is farthest away.

    A row that is compared with all others gives them a bound, too: none is farther from its nearest than from that
    row. So a sample of the rows goes first, then the most promising ones, until nobody's bound reaches the best found.
    Usually most pairs are never looked at.

    Returns:
        Its index, of shape ``[]``. Ties go to the smaller index.
    """
    size, at_once = len(cosines.unit), 64
    bound = torch.full_like(cosines.unit[:, 0], float("inf"))
    isolation = -bound
    rows = torch.arange(0, size, -(-size // _BLOCK), device=bound.device)
    while len(rows):
        others = _with_others(cosines, rows)
        isolation[rows] = 1.0 - others.amax(1)
        bound = torch.minimum(bound, 1.0 - others.amax(0))
        bound[rows] = -float("inf")
        promising = bound.topk(min(at_once, size))
        rows = promising.indices[promising.values >= isolation.max() - _ROUNDING]
    best = (isolation >= isolation.max() - _ROUNDING).nonzero().squeeze(-1)
    others = _with_others(cosines, best)
    # Two rows that are each other's nearest are equally isolated: both must get the very same number.
    mutual = others[:, best]
    others[:, best] = torch.maximum(mutual, mutual.T)
    return best[(1.0 - others.amax(1)).argmax()]


def _with_others(cosines: Cosines, index: torch.Tensor) -> torch.Tensor:
    """Cosines of rows ``index [R]`` with all rows, ``[R, N]``; ``-inf`` of a row with itself."""
    return cosines.rows(index).scatter_(1, index.unsqueeze(1), -float("inf"))


def farthest_points(x: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy solution of the max-min diversity problem, by cosine distance.

    The first pick is the point whose nearest neighbour is farthest away; each next one is the point farthest from
    those already picked.

    Args:
        x: vectors ``[N, D]``.
        count: number of picks, at most ``N``.

    Returns:
        Indices in the order of picking, ``[count]``. Ties go to the smaller index.
    """
    cosines = Cosines(x)
    return farthest_from(cosines.distances, most_isolated(cosines), len(x), count)


def farthest_from(
    distances: Callable[[torch.Tensor], torch.Tensor], first: torch.Tensor, size: int, count: int
) -> torch.Tensor:
    """Farthest-point sampling from a given start: each next pick is the point farthest from those already picked.

    A running minimum makes one pick O(N), beside the distances of one point.

    Args:
        distances: from the index ``[]`` of a point to its distances to all, ``[N]``; asked for the picks alone.
        first: index of the first pick, ``[]``.
        size: number of points, ``N``.
        count: number of picks, at most ``N``.

    Returns:
        Indices in the order of picking, ``[count]``. Ties go to the smaller index.
    """
    picked = torch.empty(count, dtype=torch.long, device=first.device)
    gap = torch.full((size,), float("inf"), device=first.device)
    best = first
    for step in range(count):
        picked[step] = best
        gap = torch.minimum(gap, distances(best))
        # A pick must not be picked again, not even where all others are its duplicates.
        gap[picked[: step + 1]] = -float("inf")
        best = gap.argmax()
    return picked


def marginal_relevance(
    x: torch.Tensor, importance: torch.Tensor, count: int, balance: float, per_round: int = 1
) -> torch.Tensor:
    """Maximal marginal relevance: ``balance * importance - (1 - balance) * (largest cosine to what is picked)``.

    The first round goes by importance alone. Only the similarities of picked rows are computed: O(N D) per pick.

    Args:
        x: vectors ``[N, D]``.
        importance: ``[N]``.
        count: number of picks, at most ``N``.
        balance: weight of the importance, 0 to 1.
        per_round: picks of one round, which do not penalise each other.

    Returns:
        Indices in the order of picking, ``[count]``.
    """
    cosines, importance = Cosines(x), importance.float()
    picked = torch.empty(count, dtype=torch.long, device=x.device)
    nearest = torch.full_like(importance, -2.0)  # below every cosine
    for start in range(0, count, per_round):
        score = importance.clone() if start == 0 else balance * importance - (1 - balance) * nearest
        score[picked[:start]] = -float("inf")
        size = min(per_round, count - start)
        best = score.argmax().reshape(1) if size == 1 else score.topk(size).indices
        picked[start : start + size] = best
        nearest = torch.maximum(nearest, cosines.rows(best).amax(0))
    return picked


def weighted_farthest_points(x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy picks of the largest ``weight * (cosine distance to the nearest picked row)``; first the largest weight.

    Args:
        x: vectors ``[N, D]``.
        weight: ``[N]``, not negative.
        count: number of picks, at most ``N``.

    Returns:
        Indices in the order of picking, ``[count]``. Ties go to the smaller index.
    """
    cosines, weight = Cosines(x), weight.float()
    picked = torch.empty(count, dtype=torch.long, device=x.device)
    gap = torch.ones_like(weight)
    for step in range(count):
        score = weight if step == 0 else weight * gap
        best = score.index_fill(0, picked[:step], -float("inf")).argmax()
        picked[step] = best
        distance = cosines.distances(best)
        gap = distance if step == 0 else torch.minimum(gap, distance)
    return picked


def dpp_map(x: torch.Tensor, quality: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy maximum-a-posteriori subset of a determinantal point process (Chen et al., arXiv 1709.05135, Alg. 1).

    The kernel is ``quality_i * cos(x_i, x_j) * quality_j``. The determinant of the picked rows is followed by an
    incremental Cholesky factor, so pick ``t`` costs O(N (D + t)).

    Args:
        x: vectors ``[N, D]``.
        quality: ``[N]``, not negative.
        count: number of picks, at most ``N``.

    Returns:
        Indices in the order of picking, ``[count]``. Ties go to the smaller index.
    """
    cosines, quality = Cosines(x), quality.float()
    factor = quality.new_empty(count, len(quality))
    picked = torch.empty(count, dtype=torch.long, device=x.device)
    alone = gain = quality.square() * cosines.unit.square().sum(-1)
    for step in range(count):
        best = gain.argmax()
        picked[step] = best
        row = quality * cosines.row(best) * quality[best] - factor[:step, best] @ factor[:step]
        # Beyond the rank of x only rounding errors are left, and nothing may be divided by them.
        spent = gain[best] <= 1e-6 * alone[best]
        factor[step] = torch.where(spent, 0.0, row / gain[best].clamp(min=1e-30).sqrt())
        gain = gain - factor[step].square()
        gain[picked[: step + 1]] = -float("inf")
    return picked


def proportional_shares(total: int, sizes: list[int]) -> list[int]:
    """Split ``total`` over groups in proportion to their ``sizes``; no group gets more than it has.

    What rounding down leaves over goes to the groups with the largest remainders, the first of equals. The shares add
    up to ``total``, or to ``sum(sizes)`` when that is less.
    """
    whole = sum(sizes)
    total = min(total, whole)
    shares = [total * size // whole for size in sizes] if whole else [0] * len(sizes)
    by_remainder = sorted(
        range(len(sizes)), key=lambda group: -(total * sizes[group] % whole) if whole else 0
    )
    for group in by_remainder[: total - sum(shares)]:
        shares[group] += 1
    return shares


def thin_out_by_matching(
    order: torch.Tensor, similarity: torch.Tensor, count: int, at_once: int = 8
) -> torch.Tensor:
    """Remove near-duplicates in rounds of bipartite matching until ``count`` are left (VisPruner, section 3.3).

    In each round the list is split into its even and its odd places; of the even ones those that are most similar to
    some odd one go. What is left of the even ones, most similar first, stands in front of the odd ones in the next
    round.

    Args:
        order: the candidates, in an order that matters: it decides the splits. ``[R]``.
        similarity: of all tokens, ``[N, N]``.
        count: how many stay.
        at_once: most that go in one round.

    Returns:
        ``[min(count, R)]``, in the order of the last round.
    """
    if count <= 0:
        return order[:0]
    # Usually one of a token's nearest is at an odd place: only for the others the whole row is searched.
    values, nearest = similarity.topk(min(32, len(similarity)))
    lowest = -float("inf")
    is_odd = torch.zeros(len(similarity), dtype=torch.bool, device=order.device)
    while len(order) > count:
        even, odd = order[::2], order[1::2]
        is_odd.zero_()[odd] = True
        closest = values[even].where(is_odd[nearest[even]], lowest).max(dim=1).values
        far = (closest == lowest).nonzero().squeeze(-1)
        closest[far] = similarity[even[far]][:, odd].max(dim=1).values
        gone = min(at_once, len(order) - count)
        order = torch.cat((even[closest.argsort(descending=True, stable=True)[gone:]], odd))
    return order


def most_covering(
    x: torch.Tensor, weight: torch.Tensor, count: int, multiply: bool = True, floor: float = 0.0
) -> torch.Tensor:
    """Greedy weighted facility location on cosine similarity.

    The coverage of a row is its largest similarity to a picked row, at least ``floor``; the gain of a candidate is
    what it adds to the coverage of all rows together. Gains only fall as picks are made, so a gain of an earlier step
    is an upper bound, and only candidates whose bound leads are computed anew (lazy greedy, Minoux 1978): the picks are
    those of the full computation.

    Args:
        x: vectors ``[N, D]``.
        weight: ``[N]``, not negative.
        count: number of picks, at most ``N``.
        multiply: score candidates by ``gain * weight``; otherwise by ``gain + weight``.
        floor: coverage of a row before the first pick; -1 lets every similarity count, as one scaled to 0..1 does.

    Returns:
        Indices in the order of picking, ``[count]``. Ties go to the smaller index.
    """
    refreshed = 32  # candidates whose gain is computed anew at once
    similarity, weight = cosine_matrix(x), weight.float()
    covered = torch.full_like(weight, floor)
    picked = torch.empty(count, dtype=torch.long, device=x.device)

    def scores(candidates: torch.Tensor) -> torch.Tensor:
        gain = (similarity[candidates] - covered).clamp(min=0).sum(-1)
        return gain * weight[candidates] if multiply else gain + weight[candidates]

    everything = torch.arange(len(x), device=x.device)
    bound = torch.cat([scores(block) for block in everything.split(_BLOCK)])
    fresh = torch.ones_like(bound, dtype=torch.bool)
    for step in range(count):
        while not fresh[best := bound.argmax()]:
            leading = bound.masked_fill(fresh, -float("inf")).topk(min(refreshed, len(bound))).indices
            bound[leading] = scores(leading)
            bound[picked[:step]] = -float("inf")
            fresh[leading] = True
        picked[step] = best
        covered = torch.maximum(covered, similarity[best])
        bound[best] = -float("inf")
        fresh.zero_()
    return picked


def density_peaks(distances: torch.Tensor, neighbours: int) -> torch.Tensor:
    """How well each point serves as the centre of a cluster: its density times its separation (Du et al., DPC-KNN).

    Args:
        distances: ``[..., N, N]``, symmetric, zero on the diagonal.
        neighbours: points whose mean squared distance makes the density, the point itself among them; at most ``N``.

    Returns:
        ``exp(-mean) * (distance to the nearest denser point)``, ``[..., N]``; a point than which none is denser counts
        with the largest distance of all.
    """
    nearest = distances.topk(neighbours, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    denser = density.unsqueeze(-2) > density.unsqueeze(-1)
    separation = torch.where(denser, distances, distances.amax((-2, -1), keepdim=True)).amin(-1)
    return separation * density


def cluster_dpc_knn(x: torch.Tensor, clusters: int, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Density-peak clustering with k nearest neighbours.

    The density of a point is ``exp(-mean squared distance to its nearest neighbours)``, itself among them; its
    separation is the distance to the nearest denser point (for the densest: the largest distance of all). Centres are
    the points with the largest product of both; every other point joins the nearest centre.

    Args:
        x: ``[N, D]``; distances are Euclidean, divided by ``sqrt(D)``.
        clusters: number of centres, at most ``N``.
        neighbours: ``k``, at most ``N``.

    Returns:
        Centres in descending order of that product ``[clusters]``, and the cluster of each point ``[N]``.
    """
    x = x.float()
    distances = torch.cdist(x, x) / x.shape[-1] ** 0.5
    centres = density_peaks(distances, neighbours).topk(clusters).indices
    member = distances[:, centres].argmin(-1)
    member[centres] = torch.arange(clusters, device=x.device)
    return centres, member


def rows_of_question(text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Places of the text behind the last visual token; of the last token when there is none.

    Only such rows can pay attention to all visual tokens.

    Args:
        text: places of the text ``[T]``.
        visual: places of the visual tokens ``[N]``.
    """
    behind = text[text > visual.max()]
    return behind if len(behind) else visual.max().reshape(1)


def highest_of_each(score: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best tokens of every sample of a batch, in sequence order, when samples keep different numbers.

    Args:
        score: ``[B, N]``; ``-inf`` where there is no token.
        counts: tokens to keep, ``[B]``.

    Returns:
        Their indices ``[B, K]`` with ``K`` the largest count, and which are real, ``[B, K]`` bool (``None`` = all).
    """
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    length = int(counts.max())
    index = (rank >= counts.unsqueeze(-1)).long().argsort(dim=-1, stable=True)[:, :length]
    if int(counts.min()) == length:
        return index, None
    return index, torch.arange(length, device=score.device) < counts.unsqueeze(-1)


def best_of_each(scores: torch.Tensor, group: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Marks the highest ``scores`` of every group; of equals the first.

    Args:
        scores: ``[N]``.
        group: number of each token's group, ``[N]``.
        counts: how many of each group, ``[groups]``; a group may have fewer.

    Returns:
        ``[N]`` bool.
    """
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[group[by_score].argsort(stable=True)]
    sizes = group.bincount()
    rank = torch.arange(len(scores), device=scores.device) - (sizes.cumsum(0) - sizes)[group[order]]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[rank < counts[group[order]]], True)


def local_then_global(
    shallow: torch.Tensor, deep: torch.Tensor, group: torch.Tensor, count: int, local: int
) -> torch.Tensor:
    """The best tokens of every group by one score, then the best of all others by another one.

    Args:
        shallow: score within the groups, ``[F, P]``.
        deep: score of the others, ``[F, P]``, not negative.
        group: of each token, ``[P]``.
        count: tokens of each row; fewer when ``local`` does not divide evenly among the groups.
        local: how many of them the groups share.

    Returns:
        ``[F, P]`` bool, equally many in each row.
    """
    mask = torch.zeros_like(shallow, dtype=torch.bool)
    groups = group.unique()
    for one in groups:
        own = (group == one).nonzero().squeeze(-1)
        best = shallow[:, own].topk(min(local // len(groups), len(own))).indices
        mask.scatter_(1, own[best], True)
    best = deep.masked_fill(mask, -1.0).topk(count - local).indices
    return mask.scatter(1, best, True)


def scaled_to_mean(
    ratios: tuple[float, ...], layers: tuple[int, ...], depth: int, mean: float
) -> tuple[float, ...]:
    """A schedule of cuts inside the decoder, times one factor, none above 1, so that layers keep ``mean`` on average.

    Args:
        ratios: fraction after each cut, not rising.
        layers: layers in front of each cut.
        depth: all layers.
        mean: above ``layers[0] / depth``, at most 1.
    """
    lengths = [stop - start for start, stop in zip(layers, (*layers[1:], depth), strict=True)]
    left = mean * depth - layers[0]
    for full in range(len(ratios)):  # the first ``full`` ratios are cut off at 1
        rest = left - sum(lengths[:full])
        factor = rest / sum(r * n for r, n in zip(ratios[full:], lengths[full:], strict=True))
        if factor * ratios[full] <= 1:
            return (*[1.0] * full, *(factor * ratio for ratio in ratios[full:]))
    return (1.0,) * len(ratios)
