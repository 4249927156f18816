"""SWIFT (2410.06916): skipped layers found while generating, and trees whose breadth follows the draft's confidence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from zoo.engines.bayesian import GaussianProcess, expected_improvement
from zoo.engines.drafting import Context, Draft, Row
from zoo.engines.self_drafting import SelfDrafter, choices_within, halves, skipping
from zoo.engines.surgery import Block
from zoo.engines.trees import ROOT, depths
from zoo.models.anatomy import Decoder

SIBLINGS = 10
"""Likeliest tokens kept per depth."""
WIDTHS = (3, 5, 8, 10)
"""Nodes at a depth, by the draft's confidence there: above 0.95, 0.8, 0.5, and below."""
SAMPLING_WIDTHS = (1, 3, 5, 10)
"""Those for sampling."""
_CANDIDATES = 256
"""Random sets among which Bayesian optimisation chooses."""


def confident_tree(confidences: Sequence[float], widths: Sequence[int]) -> tuple[list[int], list[int]]:
    """A chain of first choices, with fewer alternatives where the draft is surer.

    Args:
        confidences: highest probability at each depth.
        widths: see ``WIDTHS``.

    Returns:
        Parents (see ``zoo.engines.trees``) and ranks among the likeliest tokens of the depth, ``[n]`` each. The first
        node of a depth is on the chain.
    """
    parents: list[int] = []
    ranks: list[int] = []
    on_chain = ROOT
    for confidence in confidences:
        above = [confidence > 0.95, confidence > 0.8, confidence > 0.5, True]
        width = widths[above.index(True)]
        first = len(parents)
        parents += [on_chain] * width
        ranks += range(width)
        on_chain = first
    return parents, ranks


@dataclass(frozen=True)
class SearchSettings:
    """When the search proposes and when it ends; the names are those of the method's parameters."""

    skip_ratio: float = 0.45
    context_window: int = 50
    bayes_interval: int = 25
    search_iterations: int = 1000
    search_patience: int = 300
    search_target: float = 0.93


class OnlineSearch:
    """Which halves of layers can be skipped: one set is tried per step, the best so far is used.

    The first and the last layer always stay. It begins with every odd layer.

    Args:
        layers: of the model, 3 or more.
        settings: see there.
    """

    def __init__(self, layers: int, settings: SearchSettings) -> None:
        self.settings = settings
        self.blocks = sorted(halves(range(1, layers - 1)))
        self.count = int(len(self.blocks) * settings.skip_ratio)
        self.best = halves(range(1, layers - 1, 2))
        self.best_score = 0.0
        self.running = self.count > 0
        self._tried: list[tuple[frozenset[Block], float]] = []
        self._stale = 0
        self._generator = torch.Generator().manual_seed(0)

    def step(self, score: Callable[[Collection[Block]], float]) -> None:
        """Try one set; ``score`` is the share of tokens that the model without it predicts as the whole model does."""
        settings = self.settings
        guided = len(self._tried) % settings.bayes_interval == settings.bayes_interval - 1
        blocks = self._promising() if guided else self._any()
        value = score(blocks)
        self._tried.append((blocks, value))
        self._stale += 1
        if value > self.best_score:
            self.best, self.best_score, self._stale = blocks, value, 0
        self.running = (
            self.best_score <= settings.search_target
            and self._stale < settings.search_patience
            and len(self._tried) < settings.search_iterations
        )

    def _any(self) -> frozenset[Block]:
        order = torch.randperm(len(self.blocks), generator=self._generator)
        return frozenset(self.blocks[place] for place in order[: self.count].tolist())

    def _promising(self) -> frozenset[Block]:
        """Of many random sets the one from which a Gaussian process expects the largest improvement."""
        values = torch.tensor([-value for _, value in self._tried], dtype=torch.float64)
        model = GaussianProcess(self._points([blocks for blocks, _ in self._tried]), values)
        candidates = [self._any() for _ in range(_CANDIDATES)]
        gains = expected_improvement(*model.predict(self._points(candidates)), values.min())
        return candidates[int(gains.argmax())]

    def _points(self, sets: Sequence[frozenset[Block]]) -> torch.Tensor:
        rows = [[float(block in blocks) for block in self.blocks] for blocks in sets]
        return torch.tensor(rows, dtype=torch.float64)


class SwiftDrafter(SelfDrafter):
    """Drafts until it is unsure, verifies a tree around the draft, and looks for better sets of layers meanwhile.

    What was found stays for later generations.
    """

    tree = True

    def __init__(
        self, decoder: Decoder, draft_tokens: int, threshold: float, settings: SearchSettings
    ) -> None:
        self.search = OnlineSearch(len(decoder.layers), settings)
        super().__init__(decoder, self.search.best, draft_tokens)
        self.threshold = threshold
        self._seen: dict[int, list[tuple[float, list[int]]]] = {}

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """A new generation."""
        super().start(context, rows)
        self._seen = {}

    def propose(self, rows: Sequence[Row]) -> list[Draft]:
        """Try another set of layers, then draft with the best one."""
        window = self.search.settings.context_window
        row = next((row for row in rows if row.prompt and row.generated > window + 1), None)
        if self.search.running and row is not None:
            self.search.step(lambda blocks: self._agreement(row, blocks, window))
            self.skipped = self.search.best
        self._seen = {row.index: [] for row in rows}
        return super().propose(rows)

    def _agreement(self, row: Row, blocks: Collection[Block], window: int) -> float:
        """Share of the first generated tokens that the model without ``blocks`` would choose, too."""
        assert self.context is not None
        first = row.prompt
        with skipping(self.decoder, blocks):
            choices = choices_within(self.context, row, first, first + window)
        said = row.tokens[first + 1 : first + window + 1]
        return sum(map(int.__eq__, choices, said)) / window

    def choose(self, row: Row, draft: list[int], logits: torch.Tensor) -> tuple[int, bool]:
        """The likeliest token; its alternatives are remembered."""
        best = self.scores(row, draft, logits).softmax(-1).topk(min(SIBLINGS, len(logits)))
        confidence, tokens = float(best.values[0]), best.indices.tolist()
        self._seen[row.index].append((confidence, tokens))
        return tokens[0], confidence >= self.threshold

    def draft(self, row: Row, tokens: list[int]) -> Draft:
        """The chain and its alternatives."""
        assert self.context is not None
        seen = self._seen[row.index]
        if not seen:
            return Draft()
        known = len(seen[0][1])  # fewer than usual in a tiny vocabulary
        widths = [min(width, known) for width in (SAMPLING_WIDTHS if self.context.sample else WIDTHS)]
        parents, ranks = confident_tree([confidence for confidence, _ in seen], widths)
        levels = zip(depths(parents), ranks, strict=True)
        return Draft([seen[depth - 1][1][rank] for depth, rank in levels], parents)
