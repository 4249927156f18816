"""The mistakes that ports of visual-token methods make, looked for in every method.

UniPruneBench (arXiv 2511.02650) compares ten methods; in its published code some keep their tokens in the order of
their scores, one keeps the least important ones, and one misses its budget. Here each method runs on a prompt in which
it is known what it should find (see ``planted_pictures``), and is held to the order of the sequence, to its budget,
and to finding clearly more than the inverse choice would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import pytest
from planted_pictures import FRAMES, TOKENS, Kind, Watched, planted_model, prompt
from pydantic import Field

import zoo
from zoo.engines.reductions import Keep
from zoo.engines.tokens import View
from zoo.families.visual_tokens import VisualTokenReducer
from zoo.interface import implemented, method_class
from zoo.methods.visual_tokens.fastv import FastV
from zoo.models import LoadedModel

QUARTER = TOKENS // 4


@dataclass(frozen=True)
class Case:
    """What is expected of a method.

    Attributes:
        finds: what is planted for it; ``None`` = it chooses by chance, or not at all.
        left: visual tokens behind each of its stages; ``None`` = the picture decides.
        settings: hyper-parameters.
        order: of the survivors: that of the sequence; frame by frame; or one that the paper describes.
        rounding: tokens by which ``left`` may be missed.
    """

    finds: Kind | None
    left: tuple[int, ...] | None = (QUARTER,)
    settings: dict[str, Any] = field(default_factory=lambda: {"keep_ratio": 0.25})
    order: Literal["sequence", "frames", "own"] = "sequence"
    rounding: int = 0


CASES: dict[str, Case] = {
    "adaptinfer": Case("asked", (18, 9, 5), {"ratios": (0.5, 0.5, 0.6)}),
    "agilepruner": Case("seen"),
    "aot": Case("moving", (FRAMES * QUARTER,), order="frames"),
    "attention-debiasing": Case("asked", settings={"host_parameters": {"keep_ratio": 0.25}}),
    # Half of what shall leave goes before the LLM, the rest first in the examples, then in the last picture.
    "catp": Case("context", (3 * 24, 2 * 12 + 24, 3 * 12), {"keep_ratio": 1 / 3}),
    "cdpruner": Case("asked"),
    # Four pivots of the picture, and as many tokens for each of the eight pivots.
    "dart": Case("distinct", (4 + QUARTER // 8 * 8,)),
    "divprune": Case("distinct"),
    # Frames 0, 4 and 6 are compared with no other.
    "dycoke": Case("moving", (3 * TOKENS + 5 * int(0.3 * TOKENS),), {"keep_ratio": 0.3}, "frames"),
    "entropyprune": Case("distinct"),
    "fastervlm": Case("seen"),
    "fastv": Case("asked"),
    "fastvid": Case("moving", (FRAMES * QUARTER,)),
    "fitprune": Case("asked", (30, 24, 18, 12), {"counts": (6,) * 4 + (0,) * 28, "fitted_on": TOKENS}),
    "flowcut": Case("seen"),
    "g-prune": Case("distinct"),
    "globalcom2": Case("seen"),
    "hiprune": Case("seen", settings={"keep_ratio": 0.25, "object_layer": 2}),
    # Rounded in every frame; inside the LLM half of them stays.
    "holitom": Case("moving", (FRAMES * QUARTER, FRAMES * QUARTER // 2), order="frames", rounding=FRAMES),
    "holov": Case("seen", order="own"),  # crop by crop, by falling attention
    "idpruner": Case("seen"),
    "information-horizon": Case(None),
    # Half of the tokens are a grid, and a summary of the others comes on top; by falling attention.
    "llava-prumerge": Case("seen", (2 * int(TOKENS / 8) + 1,), order="own"),
    "lrs-vqa-dip": Case("asked"),
    "lvlm-csp": Case("asked", (18, TOKENS, 9), {"keep_ratio": 0.5, "late_share": 0.5}),
    # Merged windows come first, the most even one in front.
    "mustdrop": Case(
        "both",
        None,
        {"merge_threshold": 0.8, "global_threshold": 0.02, "individual_threshold": 0.03},
        "own",
    ),
    "pact": Case("both", None, {}),
    "prunevid": Case("moving", None, {}, "frames"),
    "pyramiddrop": Case("asked", (18, 9, 4), {"keep_ratio": 0.5}),
    "random-tokens": Case(None),
    "scope": Case("seen"),
    "segpruner": Case("distinct"),
    # 300, 200 and 110 of 576, and one cluster of recycled tokens each time.
    "sparsevlm": Case("asked", (19 + 1, 12 + 1, 7 + 1), {"keep_ratio": 1 / 3}),
    "todre": Case("distinct", (QUARTER, QUARTER), {"keep_ratio": 0.25, "tau": 0.0}),
    "transprune": Case("asked", (31, 22, 4), {"keep_ratios": (0.875, 0.625, 0.125)}),
    "vflowopt": Case(
        "seen",
        (18, 9, 7),
        {
            "threshold": 1.2,
            "cell": 3.0,
            "first_share": 0.5,
            "second_share": 0.5,
            "third_share": 0.8,
        },
    ),
    "visionzip": Case("seen", order="own"),  # dominant tokens, then contextual ones
    # 24 in the first half of the layers and 8 in the second: 16 on average.
    "vscan": Case("both", (24, 8), {"keep_ratio": 16 / TOKENS, "shallow_layer": 0, "window": 3}),
    "vtw": Case(None, (0,), {}),
    "zoo-prune": Case("distinct"),
}
"""Every visual-token method has a line here."""

SLUGS = [slug for slug in implemented() if method_class(slug).phase == "visual-tokens"]


@cache
def model() -> LoadedModel:
    return planted_model()


def case_of(slug: str) -> Case:
    assert slug in CASES, f"say in CASES of {__name__} what {slug} should find, and how much it should keep"
    return CASES[slug]


def build(slug: str, **changes: Any) -> VisualTokenReducer:
    method = zoo.method(slug, **{**case_of(slug).settings, **changes})
    assert isinstance(method, VisualTokenReducer)
    return method


def watch(method: VisualTokenReducer, kind: Kind | None) -> tuple[Watched, list[int]]:
    """A method on a prompt, and what was planted there."""
    inputs, planted = prompt(model(), kind or "both")
    with method.apply(model()) as applied:
        return Watched(applied, inputs), planted


# --- what is looked for -------------------------------------------------------------------------------------------


def check_order(watched: Watched, order: str) -> None:
    """Each survivor is there once, in the order of the sequence, or at least of the frames."""
    for places in watched.places:
        assert len(set(places)) == len(places), "a token is kept twice"
        if order == "sequence":
            assert places == sorted(places), "the survivors have changed places"
        elif order == "frames":
            frames = [place // TOKENS for place in places]
            assert frames == sorted(frames), "the frames have changed places"


def check_budget(watched: Watched, left: tuple[int, ...] | None, rounding: int = 0) -> None:
    """The caches hold what the report says, and as many tokens are left as was asked for."""
    assert watched.lengths == watched.reported
    assert min(watched.lengths) < watched.total
    if left is not None:
        counts = [len(places) for places in watched.places]
        assert len(counts) == len(left)
        assert all(abs(count - wanted) <= rounding for count, wanted in zip(counts, left, strict=True)), (
            f"{counts} tokens are left behind the stages, and {left} should be"
        )


def check_choice(watched: Watched, planted: list[int]) -> None:
    """Most of what was planted goes on, and little of it is among the tokens that leave."""
    found, missed = watched.found(planted)
    assert found >= 0.75, f"{found:.0%} of the planted tokens were found"
    assert found >= missed + 0.5, f"the inverse choice would have found {missed:.0%}, not {found:.0%}"


# --- every method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", SLUGS)
def test_order_is_kept_and_the_budget_is_met(slug: str) -> None:
    case = case_of(slug)
    method = build(slug)
    watched, _ = watch(method, case.finds)
    check_order(watched, case.order)
    check_budget(watched, case.left, case.rounding)
    # Old positions in a new order would tell the decoder that tokens stand where they do not.
    assert case.order == "sequence" or method.positions == "renumber"


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if case_of(slug).finds is not None])
def test_the_choice_beats_its_inverse(slug: str) -> None:
    check_choice(*watch(build(slug), case_of(slug).finds))


BY_NUMBER = [
    slug
    for slug in SLUGS
    if "keep_tokens" in method_class(slug).model_fields and case_of(slug).left == (QUARTER,)
]
"""Methods that cut once, to a number of tokens."""


@pytest.mark.parametrize("slug", BY_NUMBER)
def test_a_number_of_tokens_is_met_exactly(slug: str) -> None:
    watched, _ = watch(build(slug, keep_tokens=7), case_of(slug).finds)
    check_budget(watched, (7,))


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if "seed" in method_class(slug).model_fields])
def test_chance_finds_no_more_than_its_share(slug: str) -> None:
    """Only of methods that say so on their card; the others that take a seed are above."""
    by_chance = "random" in method_class(slug).card().terms("signal")
    assert by_chance == (case_of(slug).finds is None)
    if by_chance:
        seeds = range(40)
        hits = sum(watch(build(slug, seed=seed), None)[0].found(list(range(8)))[0] for seed in seeds)
        assert 0.13 < hits / len(seeds) < 0.37  # a quarter, and three standard deviations of the mean


# --- the checks themselves ----------------------------------------------------------------------------------------


class BrokenPort(FastV):
    """FastV with a mistake in what ``select`` returns."""

    mistake: Callable[[Keep, View], Keep] = Field(exclude=True)

    def select(self, view: View) -> Keep:
        """The right choice, spoilt."""
        return self.mistake(super().select(view), view)


def unsorted(right: Keep, view: View) -> Keep:
    return Keep(right.index.flip(1))


def inverted(right: Keep, view: View) -> Keep:
    others = [place for place in range(len(view.tokens)) if place not in right.index[0]]
    return Keep(right.index.new_tensor([others[: right.length]]))


def one_short(right: Keep, view: View) -> Keep:
    return Keep(right.index[:, 1:])


def verdicts(method: VisualTokenReducer) -> list[str]:
    """Names of the checks that a port of FastV fails."""
    watched, planted = watch(method, "asked")
    failed = []
    for name, check in {
        "order": lambda: check_order(watched, "sequence"),
        "budget": lambda: check_budget(watched, (QUARTER,)),
        "choice": lambda: check_choice(watched, planted),
    }.items():
        try:
            check()
        except AssertionError:
            failed.append(name)
    return failed


@pytest.mark.parametrize(
    ("mistake", "caught"), [(unsorted, "order"), (inverted, "choice"), (one_short, "budget")]
)
def test_each_mistake_is_caught_by_its_check(mistake: Callable[[Keep, View], Keep], caught: str) -> None:
    assert verdicts(FastV(keep_ratio=0.25)) == []
    assert verdicts(BrokenPort(keep_ratio=0.25, mistake=mistake)) == [caught]


def test_the_table_names_no_method_that_is_gone() -> None:
    assert set(CASES) <= set(SLUGS)
    assert all(a < b for a, b in pairwise(CASES)), "the table is sorted by name"
