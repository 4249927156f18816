"""Draft & Verify (2309.08168): a threshold that adapts, and the search for the blocks to skip."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from zoo.engines.bayesian import Search
from zoo.engines.drafting import Context, Row, Verified
from zoo.engines.self_drafting import SelfDrafter, halves
from zoo.engines.surgery import Block
from zoo.errors import BadInput
from zoo.families.decoding import Decoder
from zoo.models import LoadedModel, anatomy

ADAPTATION = (1, 0.5, 0.9, 0.01, 0.9)
"""Draft & Verify: steps between adaptations, memory of the match rate, match rate aimed at, change, memory of it."""


class AdaptiveThreshold:
    """The confidence below which a draft ends, steered to a match rate (Draft & Verify, official code).

    Args:
        threshold: at first.
        most: longest draft. A draft of that length says nothing against the threshold.
        adaptation: see ``ADAPTATION``.
    """

    def __init__(self, threshold: float, most: int, adaptation: Sequence[float] = ADAPTATION) -> None:
        self.threshold = threshold
        self.most = most
        self.every, self.memory, self.aim, self.change, self.inertia = adaptation
        self.match_rate = 0.0
        self._steps = 0

    def update(self, drafted: int, matched: int) -> None:
        """After a verification of ``drafted`` tokens (1 or more)."""
        self._steps += 1
        if self._steps % int(self.every):
            return
        self.match_rate = self.memory * self.match_rate + (1 - self.memory) * matched / drafted
        wanted = self.threshold
        if self.match_rate < self.aim:
            wanted += self.change
        elif drafted != self.most:
            wanted -= self.change
        self.threshold = self.inertia * self.threshold + (1 - self.inertia) * wanted


class DraftAndVerifyDrafter(SelfDrafter):
    """Drafts until it is unsure; how sure it must be adapts, sample by sample."""

    def __init__(
        self, decoder: anatomy.Decoder, skipped: Collection[Block], draft_tokens: int, threshold: float
    ) -> None:
        super().__init__(decoder, skipped, draft_tokens)
        self.threshold = threshold
        self.adaptive: dict[int, AdaptiveThreshold] = {}

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """Every generation begins with the same threshold."""
        super().start(context, rows)
        self.adaptive = {row.index: AdaptiveThreshold(self.threshold, self.draft_tokens) for row in rows}

    def choose(self, row: Row, draft: list[int], logits: torch.Tensor) -> tuple[int, bool]:
        """The likeliest token; one that is not likely enough is the last."""
        confidence, token = self.scores(row, draft, logits).softmax(-1).max(-1)
        return int(token), float(confidence) >= self.adaptive[row.index].threshold

    def observe(self, row: Row, verified: Verified) -> None:
        """Adapt."""
        if drafted := len(verified.tokens) - 1 if not verified.prefill else 0:
            self.adaptive[row.index].update(drafted, len(verified.path))


def quickest_blocks(
    loaded: LoadedModel,
    prompts: Sequence[Mapping[str, Any]],
    method: Callable[..., Decoder],
    *,
    calls: int,
    initial: int,
    new_tokens: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[int, ...]]:
    """What to skip for the least time per token, by Bayesian optimisation.

    One variable in ``[0, 1]`` per block, which is skipped above one half; the attention of layer 0 is no candidate.

    Args:
        prompts: inputs of one prompt each.
        method: makes the method from ``skip_attention`` and ``skip_mlp``.
        calls, initial, new_tokens, seed, progress: see ``LayerSkipSelfSpeculation.fit``.

    Returns:
        The best ``skip_attention`` and ``skip_mlp``.

    Raises:
        BadInput: no language model, or no prompt.
    """
    decoder = loaded.anatomy.decoder
    if not prompts or decoder is None:
        raise BadInput("the search for layers to skip needs a language model and one prompt or more")
    blocks = sorted(halves(range(len(decoder.layers))) - {Block(0, "attention")})
    search = Search([(0.0, 1.0)] * len(blocks), initial, seed)

    def skipped(point: Sequence[float]) -> dict[str, tuple[int, ...]]:
        chosen = [block for block, value in zip(blocks, point, strict=True) if value > 0.5]
        return {
            f"skip_{part}": tuple(block.index for block in chosen if block.part == part)
            for part in ("attention", "mlp")
        }

    for call in range(calls):
        tokens, begun = 0, perf_counter()
        applied = method(**skipped(search.ask())).apply(loaded)
        for inputs in prompts:
            applied.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
            tokens += sum(map(len, (step.tokens for step in applied.trace)))
        search.tell((perf_counter() - begun) / max(1, tokens))
        if progress is not None:
            progress(call + 1, calls)
    return skipped(search.best)
