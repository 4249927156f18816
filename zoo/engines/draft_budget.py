"""How much of a draft to verify: the part that maximises expected tokens per second, which may be nothing.

Seconds follow from the verification-cost curve of the model, expected tokens from how often nodes of a kind were right.
That is learnt for nothing: every proposal, verified or not, is compared with what is really generated after it.

Expectations can be wrong, so an account is kept, in plain steps: every step pays in a little, every accepted token one,
and a draft is verified only when the account covers what it costs more than a plain step. By the curve, decoding can
therefore never take longer than plain decoding by more than the allowance.

Drafting itself goes on the account where it takes passes through a model: it is timed, and left out while the account
does not cover it. So does the verification of drafts that must not be cut, which is all or nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter

from zoo.engines.drafting import Context, Draft, Drafter, Kind, Row, Verified
from zoo.engines.trees import DETACHED, ROOT, children, depths
from zoo.engines.verification_cost import VerificationCost, steady_clock

ALLOWANCE = 0.01
"""Share of the time of plain decoding that may be lost."""
OPENING = 1.0
"""What is on the account when a generation begins, in plain steps."""
MOST = 10.0
"""Most that is kept on the account, so that past gains do not pay for a long stretch of losses."""
MEMORY = 200
"""Steps after which an observation counts about a third (1 / e)."""
PRIOR = 0.25
"""Chance of a node of a kind that was never observed. It is low: to wait for observations costs nothing."""
PRIOR_WEIGHT = 2.0
"""How many observations that counts as."""
LATEST = 0.2
"""Weight of the latest draft among those before it: of what it took, and of what it brought."""
MARGIN = 1.03
"""By which factor a draft must be expected to pay: of many estimates the highest is often an overestimate."""


class Acceptance:
    """How often nodes of each kind were the target's own choice, given that their parent was."""

    def __init__(self) -> None:
        self._right: dict[Kind, float] = {}
        self._tried: dict[Kind, float] = {}
        self._step: dict[Kind, int] = {}
        self._fade = 1 - 1 / MEMORY
        self.steps = 0

    def chance(self, kind: Kind, rank: int) -> float:
        """Chance that a node is right, its parent being right.

        Args:
            kind: of the node.
            rank: its place among its siblings. Without observations each has half the chance of the one before it.
        """
        prior = PRIOR * 0.5**rank
        tried = self._tried.get(kind)
        if tried is None:
            return prior
        faded = self._fade ** (self.steps - self._step[kind])
        return (self._right[kind] * faded + prior * PRIOR_WEIGHT) / (tried * faded + PRIOR_WEIGHT)

    def count(self, kind: Kind, right: bool) -> None:
        """An observation."""
        faded = self._fade ** (self.steps - self._step.get(kind, self.steps))
        self._right[kind] = self._right.get(kind, 0.0) * faded + right
        self._tried[kind] = self._tried.get(kind, 0.0) * faded + 1
        self._step[kind] = self.steps


class Walk:
    """A proposal, followed along the text that is generated in its place for as long as the two agree."""

    def __init__(self, draft: Draft, place: int) -> None:
        self.tokens = draft.tokens
        self.kinds = kinds_of(draft)
        self.below = children(parents_of(draft))
        self.place = place
        self._node = ROOT

    def advance(self, text: Sequence[int], acceptance: Acceptance) -> bool:
        """Count the candidates for every new token of ``text`` behind ``place``; ``False`` when there are no more."""
        for token in text[self.place :]:
            siblings = self.below[self._node + 1]
            for node in siblings:
                acceptance.count(self.kinds[node], self.tokens[node] == token)
            right = [node for node in siblings if self.tokens[node] == token]
            if not right:
                return False
            self._node = right[0]
        self.place = len(text)
        return bool(self.below[self._node + 1])


def parents_of(draft: Draft) -> Sequence[int]:
    """Parents of the nodes, of a chain too."""
    return draft.parents if draft.parents is not None else range(-1, len(draft.tokens) - 1)


def kinds_of(draft: Draft) -> Sequence[Kind]:
    """The kinds that the drafter gave; otherwise depth and rank among siblings."""
    if draft.kinds is not None:
        return draft.kinds
    parents = parents_of(draft)
    return list(zip(depths(parents), ranks(parents), strict=True))


def ranks(parents: Sequence[int]) -> list[int]:
    """Place of each node among its siblings, from 0."""
    count: Counter[int] = Counter()
    result = []
    for parent in parents:
        result.append(count[parent])
        count[parent] += 1
    return result


def by_gain(draft: Draft, acceptance: Acceptance) -> list[tuple[float, int]]:
    """Nodes by falling chance of being accepted, each with that chance; parents come before their children."""
    chances: list[float] = []
    parents = parents_of(draft)
    for kind, parent, rank in zip(kinds_of(draft), parents, ranks(parents), strict=True):
        above = 1.0 if parent == ROOT else chances[parent]
        chances.append(above * min(1.0, acceptance.chance(kind, rank)))
    order = sorted(range(len(chances)), key=lambda node: (-chances[node], node))
    return [(chances[node], node) for node in order]


class Thrifty(Drafter):
    """Another drafter whose drafts are cut to what pays.

    Samples of a batch share the pass, hence the width of their drafts. Drafts whose tokens were drawn (to cut them by
    what they are would bias sampling) and trees with a mask or with nodes of their own stay whole: whether there is
    one is decided before it is made, by what the earlier ones took.

    Args:
        inner: the drafter.
        cost: of verification.
        clock: times costly drafters, in seconds; ``None`` is ``steady_clock``.
    """

    def __init__(
        self, inner: Drafter, cost: VerificationCost, clock: Callable[[], float] | None = None
    ) -> None:
        self.inner = inner
        self.cost = cost
        self.clock = clock
        self.needs = inner.needs
        self.tree = inner.tree
        self.rule = inner.rule
        self.acceptance = Acceptance()
        self.account = OPENING
        self.price: float | None = None
        """What a draft takes before anything of it can be left out, in plain steps; ``None`` before the first.
        Drafts that take more than the opening account are made again only in generations long enough to save up."""
        self.gain = 0.0
        """What such a draft brings in the end, in plain steps. Where it is a loss, generations begin with nothing."""
        self._now: Callable[[], float] = clock or perf_counter
        self._walks: dict[int, list[Walk]] = {}
        self._samples = 1
        self._prices: tuple[tuple[int, int], list[float]] = ((-1, -1), [])
        self._plain: float | None = None
        self._pass: tuple[float, float] | None = None
        self._before: float | None = None

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """What was learnt about acceptance stays from one generation to the next."""
        # Gains of one generation do not pay for losses of the next.
        self.account = OPENING if self.gain >= 0 else 0.0
        if self.inner.costly:
            self._now = self.clock or steady_clock(context.model)
        self._pass = self._before = None
        self._walks = {row.index: [] for row in rows}
        self.inner.start(context, rows)

    def propose(self, rows: Sequence[Row]) -> list[Draft]:
        """The drafts of the inner drafter, or what pays of them."""
        self.acceptance.steps += 1
        self._samples = len(rows)
        if self._before is not None:
            self.gain += LATEST * (self.account - self._before - self.gain)
            self._before = None
        self.account = min(MOST, self.account + ALLOWANCE)
        context = max(len(row.tokens) for row in rows)
        affordable = (self.price or 0.0) <= self.account
        drafts = self._drafts(rows, context) if affordable else [Draft() for _ in rows]
        if self.inner.costly:
            extra = self._extra(max(len(draft.tokens) for draft in drafts), context)
            self._pass = (self._now(), 1 + extra)
        return drafts

    def _drafts(self, rows: Sequence[Row], context: int) -> list[Draft]:
        """Drafts, cut where that is possible, and paid for."""
        begun = self._now() if self.inner.costly else 0.0
        drafts = self.inner.propose(rows)
        drafts = [draft.within(row.limit) for draft, row in zip(drafts, rows, strict=True)]
        price = 0.0
        if self.inner.costly:
            plain = self._plain or self.cost(self._samples, context)
            price = (self._now() - begun) / plain
        whole = not all(map(cuttable, drafts))
        if whole:
            price += self._extra(max(len(draft.tokens) for draft in drafts), context)
        if price:
            self._before = self.account
        self.account -= price
        self.price = price if self.price is None else self.price + LATEST * (price - self.price)
        return drafts if whole else self._cut(rows, drafts, context)

    def _cut(self, rows: Sequence[Row], drafts: Sequence[Draft], context: int) -> list[Draft]:
        """What pays of the drafts."""
        for row, draft in zip(rows, drafts, strict=True):
            self._learn(row, draft)
        ranked = [by_gain(draft, self.acceptance) for draft in drafts]
        width = self._best_width(ranked, context)
        cut = [
            draft.only(sorted(node for _, node in ranking[:width]))
            for draft, ranking in zip(drafts, ranked, strict=True)
        ]
        self.account -= self._extra(max(len(draft.tokens) for draft in cut), context)
        return cut

    def _learn(self, row: Row, draft: Draft) -> None:
        """Follow the earlier proposals along what was committed since, and from now on this one too."""
        walks = [walk for walk in self._walks[row.index] if walk.advance(row.tokens, self.acceptance)]
        if draft.tokens:
            walks.append(Walk(draft, len(row.tokens)))
        self._walks[row.index] = walks

    def _best_width(self, ranked: Sequence[Sequence[tuple[float, int]]], context: int) -> int:
        """Nodes per sample that maximise tokens per time, among the affordable numbers."""
        expected = float(len(ranked))  # a plain step gives one token to each
        best, best_rate = 0, MARGIN * expected
        for width in range(1, max(map(len, ranked)) + 1):
            expected += sum(ranking[width - 1][0] for ranking in ranked if len(ranking) >= width)
            extra = self._extra(width, context)
            rate = expected / (1 + extra)
            if rate > best_rate and extra <= max(0.0, self.account):
                best, best_rate = width, rate
        return best

    def _extra(self, width: int, context: int) -> float:
        """What a pass over ``width`` nodes per sample costs more than a plain one, in plain steps."""
        if width == 0:
            return 0.0
        key = (self._samples, context // 64)
        if self._prices[0] != key:
            self._prices = (key, [])
        prices = self._prices[1]
        plain = self.cost(self._samples, context) if len(prices) < width else 1.0
        while len(prices) < width:
            positions = self._samples * (len(prices) + 2)
            prices.append(max(0.0, self.cost(positions, context) / plain - 1))
        return prices[width - 1]

    def observe(self, row: Row, verified: Verified) -> None:
        """Pay in what was accepted; the first sample comes right behind the pass, which tells how long that took."""
        if self._pass is not None:
            begun, length = self._pass
            seconds = (self._now() - begun) / length
            self._plain = seconds if self._plain is None else self._plain + LATEST * (seconds - self._plain)
            self._pass = None
        self.account = min(MOST, self.account + len(verified.path) / self._samples)
        self.inner.observe(row, verified)

    def stop(self) -> None:
        """The generation is over."""
        self._walks = {}
        self.inner.stop()

    def close(self) -> None:
        """The method is taken off."""
        self.inner.close()


def cuttable(draft: Draft) -> bool:
    """Whether the nodes can be left out one by one."""
    own_mask = draft.seen is not None or draft.depths is not None
    return not own_mask and draft.laws is None and DETACHED not in (draft.parents or ())
