"""Depth methods that search: take out one block after the other, each time the one that is missed least."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import torch
from pydantic import Field

from zoo.engines.removal_search import Removal, greedy_search
from zoo.engines.statistics import Progress
from zoo.engines.surgery import Block
from zoo.errors import BadParameter
from zoo.families.layer_removal import LayerRemover
from zoo.families.weights import Facts, Work
from zoo.models.anatomy import Decoder


class GreedyRemover(LayerRemover):
    """Base of methods that remove by the loss on calibration text.

    The work is removals times candidates times forward passes over the text, half of it saved by sharing what runs
    below a candidate; hence few windows by default.
    """

    windows: int = Field(
        8, ge=1, description="How many of the calibration windows every candidate is tried on."
    )

    @abstractmethod
    def blocks(self, decoder: Decoder) -> list[Block]:
        """What the decoder runs, as blocks, in running order."""

    @abstractmethod
    def candidates(self, left: list[Block]) -> list[Block]:
        """Of the blocks that are left, those that may leave now, in the order in which ties are settled."""

    @abstractmethod
    def score(self, losses: torch.Tensor, tokens: int) -> float:
        """What is compared, lowest first, from the mean next-token losses ``[windows]`` (float64, natural logarithm).

        ``tokens`` is the length of a window.
        """

    def search(
        self,
        decoder: Decoder,
        windows: torch.Tensor,
        *,
        batch: int = 8,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ) -> list[Removal]:
        """All steps of the search; see ``zoo.engines.removal_search.greedy_search``.

        Raises:
            BadParameter: so many blocks cannot leave.
            BadInput, RunFailed: the calibration windows are too short, or no loss on them is finite.
        """
        blocks = self.blocks(decoder)
        count = self.count(len(blocks))
        self._check_count(blocks, count)
        return greedy_search(
            decoder,
            blocks,
            count,
            windows,
            candidates=self.candidates,
            score=lambda losses: self.score(losses, windows.shape[1]),
            batch=batch,
            device=device,
            progress=progress,
        )

    def _check_count(self, blocks: list[Block], count: int) -> None:
        """Before a long search: will there be something to remove in every step? How many, not which, decides that."""
        left = list(blocks)
        for step in range(count):
            free = self.candidates(left)
            if not free:
                raise BadParameter(
                    f"{self.slug} shall remove {count} of {len(blocks)}, and only {step} of them may leave: "
                    "ask for fewer"
                )
            left.remove(free[0])

    def choose(self, work: Work) -> list[Block]:
        """The blocks found, in the order in which they left."""
        windows = work.windows[: self.windows]
        removals = self.search(
            work.decoder, windows, batch=work.batch, device=work.device, progress=work.progress
        )
        return [removal.block for removal in removals]

    def facts(self, blocks: Collection[Block]) -> Facts:
        """In which order they left."""
        return {"order of removal": ", ".join(map(str, blocks))}
