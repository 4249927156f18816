"""The greedy rules of visual-token methods beside plain translations of their definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import visual_tokens_plain as plain

from zoo.bench.record import Figure
from zoo.bench.timing import alternate, ready, summarise
from zoo.engines import selection as rules
from zoo.methods.visual_tokens.todre import grow

CPU = torch.device("cpu")
SPEED = 5.0


@dataclass
class Speed:
    """One greedy rule beside its plain translation; milliseconds of processor time."""

    rule: str
    used_by: str
    plain_ms: Figure
    own_ms: Figure
    speed_up: Figure
    of_it_matrix_ms: float | None


class Case(NamedTuple):
    """A rule, a method that uses it, both forms of it, and whether ours computes the whole matrix."""

    rule: str
    used_by: str
    plain: Callable[[], list[int]]
    own: Callable[[], torch.Tensor]
    needs_matrix: bool = False


def measure_rules(repeats: int, tokens: int, count: int, width: int) -> list[Speed]:
    """Own rules against plain ones, on vectors that form loose clusters.

    Raises:
        SystemExit: they pick differently.
    """
    x, weight = clusters(tokens, width)
    whole = {"matrix": ready(partial(rules.cosine_matrix, x))}
    matrix = alternate(whole, CPU, repeats=repeats)["matrix"].figure(1000).median
    print(
        f"{count} of {tokens} vectors of width {width}; their cosine matrix alone, one half of it computed, takes "
        f"{matrix:.0f} ms\n"
    )
    print(f"{'rule':20}{'of':>19}{'plain ms':>11}{'here ms':>10}{'speed-up':>16}  picks")
    found = []
    for case in cases(x, weight, count):
        samples = alternate({"plain": ready(case.plain), "own": ready(case.own)}, CPU, repeats=repeats)
        if samples["plain"].result != samples["own"].result.tolist():
            raise SystemExit(f"{case.rule}: the picks differ from those of the plain translation")
        pairs = zip(samples["plain"].seconds, samples["own"].seconds, strict=True)
        speed_up = summarise([a / b for a, b in pairs])
        plain_ms, own_ms = (samples[arm].figure(1000) for arm in ("plain", "own"))
        of_it_matrix = matrix if case.needs_matrix else None
        found.append(Speed(case.rule, case.used_by, plain_ms, own_ms, speed_up, of_it_matrix))
        ratio = f"{speed_up.median:.1f}x ±{speed_up.spread or 0:.1f}"
        below = "" if speed_up.median >= SPEED else f" (aim: {SPEED:g}x)"
        print(
            f"{case.rule:20}{case.used_by:>19}{plain_ms.median:11.1f}{own_ms.median:10.1f}{ratio:>16}  same{below}",
            flush=True,
        )
    return found


def clusters(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors ``[tokens, width]`` around 40 centres, and a positive weight for each."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(40, width, generator=generator)
    member = torch.randint(len(centres), (tokens,), generator=generator)
    x = centres[member] + torch.randn(tokens, width, generator=generator)
    return x, torch.rand(tokens, generator=generator) + 0.01


def cases(x: torch.Tensor, weight: torch.Tensor, count: int) -> list[Case]:
    """Every rule on the same vectors."""
    start = torch.tensor(0)
    return [
        Case(
            "max-min diversity", "divprune",
            lambda: plain.max_min(x, count),
            lambda: rules.farthest_points(x, count),
        ),
        Case(
            "farthest points", "segpruner",
            lambda: plain.from_first(x, count),
            lambda: rules.farthest_from(rules.Cosines(x).distances, start, len(x), count),
        ),
        Case(
            "k-centre", "todre (version 1)",
            lambda: plain.from_first(x, count),
            lambda: grow(x, 0, count, torch.maximum),
        ),
        Case(
            "max-sum diversity", "todre",
            lambda: plain.max_sum(x, count),
            lambda: grow(x, 0, count, torch.add),
        ),
        Case(
            "marginal relevance", "idpruner",
            lambda: plain.relevance(x, weight, count),
            lambda: rules.marginal_relevance(x, weight, count, 0.5),
        ),
        Case(
            "weighted farthest", "zoo-prune",
            lambda: plain.weighted(x, weight, count),
            lambda: rules.weighted_farthest_points(x, weight, count),
        ),
        Case(
            "DPP", "cdpruner",
            lambda: plain.determinant(x, weight, count),
            lambda: rules.dpp_map(x, weight, count),
        ),
        Case(
            "coverage", "scope",
            lambda: plain.coverage(x, weight, count),
            lambda: rules.most_covering(x, weight, count),
            needs_matrix=True,
        ),
    ]  # fmt: skip
