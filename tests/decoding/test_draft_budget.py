"""How much of a draft is verified, on curves made for the purpose."""

from __future__ import annotations

import random

import pytest
import torch
from decoders import VOCABULARY, Fixed, build, left_padded, plain, plug, prompts

import zoo
from zoo.engines.draft_budget import (
    ALLOWANCE,
    OPENING,
    PRIOR,
    PRIOR_WEIGHT,
    Acceptance,
    Thrifty,
    Walk,
    by_gain,
)
from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.engines.sampling import longest_match
from zoo.engines.verification_cost import VerificationCost

FREE = VerificationCost((1, 64), (64,), ((1.0, 1.0),))
STEEP = VerificationCost((1, 64), (64,), ((1.0, 64.0),))
STEP = VerificationCost((1, 2, 4, 5, 64), (64,), ((1.0, 1.5, 1.5, 30.0, 90.0),))
"""Up to four positions cost one and a half plain steps, more are far too dear."""


def test_observations_replace_the_first_guess_and_fade() -> None:
    acceptance = Acceptance()
    assert acceptance.chance(("a",), 0) == PRIOR
    assert acceptance.chance(("a",), 2) == PRIOR / 4
    for _ in range(50):
        acceptance.count(("a",), False)
        acceptance.count(("b",), True)
    assert acceptance.chance(("a",), 0) == pytest.approx(PRIOR * PRIOR_WEIGHT / (50 + PRIOR_WEIGHT))
    assert acceptance.chance(("b",), 0) == pytest.approx((50 + PRIOR * PRIOR_WEIGHT) / (50 + PRIOR_WEIGHT))
    acceptance.steps += 3000
    assert acceptance.chance(("b",), 0) == pytest.approx(PRIOR, abs=0.01)


def observed(acceptance: Acceptance, kind: str) -> float:
    """Times right, less times wrong."""
    chance = acceptance.chance((kind,), 0)
    return 0.0 if chance == PRIOR else 1.0 if chance > PRIOR else -1.0


def test_only_nodes_below_right_ones_are_counted() -> None:
    acceptance = Acceptance()
    kinds = [("x",), ("y",), ("below x",), ("below y",), ("deeper",)]
    walk = Walk(Draft([1, 2, 3, 4, 5], [-1, -1, 0, 1, 3], kinds=kinds), place=2)
    assert walk.advance([8, 9, 2], acceptance)
    assert [observed(acceptance, *kind) for kind in kinds] == [-1, 1, 0, 0, 0]
    assert walk.advance([8, 9, 2, 4], acceptance)
    assert not walk.advance([8, 9, 2, 4, 6], acceptance)
    assert [observed(acceptance, *kind) for kind in kinds] == [-1, 1, 0, 1, -1]


def test_a_walk_ends_at_a_leaf() -> None:
    acceptance = Acceptance()
    assert not Walk(Draft([1, 2]), place=0).advance([1, 2, 3], acceptance)
    assert acceptance.chance((1, 0), 0) > PRIOR
    assert acceptance.chance((2, 0), 0) > PRIOR


def test_parents_come_before_their_children() -> None:
    rng = random.Random(0)
    acceptance = Acceptance()
    parents = [rng.randint(-1, node - 1) for node in range(40)]
    tokens = [rng.randrange(3) for _ in range(40)]
    for _ in range(30):
        Walk(Draft(tokens, parents), 0).advance([rng.randrange(3) for _ in range(8)], acceptance)
    order = [node for _, node in by_gain(Draft(tokens, parents), acceptance)]
    place = {node: index for index, node in enumerate(order)}
    assert all(parent < 0 or place[parent] < place[node] for node, parent in enumerate(parents))
    gains = [gain for gain, _ in by_gain(Draft(tokens, parents), acceptance)]
    assert gains == sorted(gains, reverse=True)


class Counting(Drafter):
    """Guesses that the text counts on, up to 10."""

    def propose_row(self, row: Row) -> Draft:
        last = row.tokens[-1]
        return Draft(list(range(1 if last >= 10 else last + 1, 11)))


def run(cost: VerificationCost, right: int, steps: int) -> tuple[list[int], float]:
    """Widths of ``steps`` steps over a text that counts from 1 to ``right`` and on from 20; also seconds per token."""
    thrifty = Thrifty(Counting(), cost)
    text = [20, *[*range(1, right + 1), 20] * (11 * steps)]
    row = Row(0, text[:1], 1, limit=1000)
    thrifty.start(None, [row])
    widths, seconds = [], 0.0
    for _ in range(steps):
        (draft,) = thrifty.propose([row])
        coming = text[len(row.tokens) :]
        count = longest_match(draft.tokens, coming)
        row.tokens += coming[: count + 1]
        thrifty.observe(
            row, Verified([0, *draft.tokens], list(range(count)), coming[: count + 1], draft=draft)
        )
        widths.append(len(draft.tokens))
        seconds += cost(1 + len(draft.tokens), 64)
    return widths, seconds / (len(row.tokens) - 1)


def test_free_verification_takes_the_whole_draft() -> None:
    assert run(FREE, 0, 5)[0] == [10] * 5


def test_drafts_that_fail_are_not_verified() -> None:
    for cost in (STEP, STEEP, VerificationCost((1, 64), (64,), ((1.0, 8.0),))):
        widths, seconds = run(cost, 0, 300)
        assert seconds * 300 <= 300 * (1 + ALLOWANCE) + OPENING
        assert set(widths[50:]) == {0}


def test_the_width_is_the_one_that_pays_best() -> None:
    widths, seconds = run(STEP, 10, 200)
    assert max(widths) == 3, "more would be far too dear"
    assert widths[20:].count(3) > 100
    assert seconds < 0.6


def test_wrong_expectations_cost_no_more_than_the_allowance() -> None:
    """A drafter that is believed and never right: the account runs dry."""
    thrifty = Thrifty(Fixed(lambda context, row: Draft([1, 2, 3])), STEP)
    thrifty.acceptance.chance = lambda kind, rank: 0.9
    row = Row(0, [0], 1, limit=1000)
    thrifty.start(None, [row])
    seconds = 0.0
    for _ in range(400):
        (draft,) = thrifty.propose([row])
        row.tokens.append(20)
        thrifty.observe(row, Verified([0, *draft.tokens], [], [20], draft=draft))
        seconds += STEP(1 + len(draft.tokens), 64)
    assert 400 < seconds <= 400 * (1 + ALLOWANCE) + OPENING


def test_what_begins_to_pay_is_noticed_without_being_verified() -> None:
    thrifty = Thrifty(Counting(), STEP)
    row = Row(0, [20], 1, limit=1000)
    thrifty.start(None, [row])

    def plain_step(token: int) -> int:
        (draft,) = thrifty.propose([row])
        row.tokens.append(token)
        thrifty.observe(row, Verified([0, *draft.tokens], [], [token], draft=draft))
        return len(draft.tokens)

    assert not any(plain_step(20) for _ in range(100))
    # The text begins to count; it is noticed although every step so far was a plain one.
    widths = [plain_step(token) for _ in range(20) for token in range(1, 11)]
    assert widths[0] == 0
    assert 3 in widths


def test_samples_share_the_width() -> None:
    thrifty = Thrifty(Counting(), STEP)
    rows = [Row(index, [20], 1, limit=1000) for index in range(2)]
    thrifty.start(None, rows)
    for depth in range(1, 4):
        thrifty.acceptance.count((depth, 0), True)
        thrifty.acceptance.count((depth, 0), True)
    drafts = thrifty.propose(rows)
    # Two samples make two positions of a plain pass; four positions are one more for each.
    assert [len(draft.tokens) for draft in drafts] == [1, 1]


def test_drawn_tokens_are_not_cut() -> None:
    """To leave out what looks unlikely would bias sampling: all or nothing, by what drafts took before."""
    laws = torch.full((3, VOCABULARY), 1 / VOCABULARY)
    thrifty = Thrifty(Fixed(lambda context, row: Draft([1, 2, 3], laws=laws)), STEP)
    row = Row(0, [0], 1, limit=9)
    thrifty.start(Context(None, None, True, frozenset(), 99, None, (1,)), [row])
    widths = []
    for _ in range(300):
        (draft,) = thrifty.propose([row])
        thrifty.observe(row, Verified([0, *draft.tokens], [], [20], draft=draft))
        widths.append(len(draft.tokens))
    assert set(widths) == {0, 3}
    # Three tokens take half a plain step more: twice the opening account, then as often as the allowance covers it.
    assert sum(widths) / 3 == pytest.approx(2 + 300 * ALLOWANCE / 0.5, abs=1)


class Slow(Drafter):
    """Two seconds for a draft."""

    costly = True

    def __init__(self, right: bool) -> None:
        self.right = right
        self.seconds = 0.0
        self.drafts = 0

    def propose_row(self, row: Row) -> Draft:
        self.seconds += 2
        self.drafts += 1
        return Draft([7, 7, 7, 7] if self.right else [1, 1])


@pytest.mark.parametrize("right", [False, True])
def test_drafting_that_takes_time_must_pay(right: bool) -> None:
    """A plain step takes two seconds, so the account is in units of two, whatever the curve's own seconds."""
    drafter = Slow(right)
    thrifty = Thrifty(drafter, FREE, clock=lambda: drafter.seconds)
    row = Row(0, [0], 1, limit=1000)
    thrifty.start(None, [row])
    for _ in range(300):
        (draft,) = thrifty.propose([row])
        drafter.seconds += 2
        path = list(range(len(draft.tokens))) if right else []
        row.tokens += [7] * (len(path) + 1)
        thrifty.observe(row, Verified([0, *draft.tokens], path, [7] * (len(path) + 1), draft=draft))
    plain = 2 * (len(row.tokens) - 1)
    if right:
        assert drafter.drafts == 300
        assert drafter.seconds < 0.5 * plain
    else:
        assert 2 <= drafter.drafts <= 7
        assert drafter.seconds <= plain * (1 + ALLOWANCE) + 2 * (OPENING + 1)
    thrifty.start(None, [row])
    assert thrifty.account == (OPENING if right else 0)


METHODS = ["prompt-lookup", "token-recycling", "sam-decoding", "goose"]


@pytest.mark.parametrize("cost", [FREE, STEP], ids=["free", "step"])
@pytest.mark.parametrize("slug", METHODS)
def test_output_is_that_of_generate(slug: str, cost: VerificationCost) -> None:
    loaded = build(initializer_range=0.05)
    rows = [prompts(1, length, seed)[0] for seed, length in enumerate((9, 25))]
    ids, mask = left_padded(rows)
    applied = zoo.method(slug, budget="auto").apply(loaded, cost=cost)
    for _ in range(2):
        out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=60)
        assert torch.equal(out, plain(loaded, ids, attention_mask=mask, max_new_tokens=60))


def test_drafting_ends_where_it_does_not_pay() -> None:
    loaded = build(initializer_range=0.3)
    applied = plug(loaded, Thrifty(Counting(), STEEP))
    out = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=60)
    assert torch.equal(out, plain(loaded, prompts(), max_new_tokens=60))
    assert applied.report.decoding is not None
    assert sum(applied.report.decoding.drafted) <= 1


def test_the_curve_is_measured_when_none_is_given(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.engines import verification_cost as engine

    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "measure", lambda model: STEP)
    drafter = zoo.method("goose", budget="auto").apply(build()).drafter
    assert isinstance(drafter, Thrifty)
    assert drafter.cost == STEP
    assert not isinstance(zoo.method("goose").apply(build()).drafter, Thrifty)
