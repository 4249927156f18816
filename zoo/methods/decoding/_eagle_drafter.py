"""EAGLE at work: the head reads the true features of what was committed and drafts a tree on predicted ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache

from zoo.engines.draft_heads import Output
from zoo.engines.drafting import Context, Draft, Drafter, Row, Verified
from zoo.methods.decoding._eagle_head import EagleHead, Embed
from zoo.methods.decoding._eagle_trees import Growth


class _Reader:
    """What the head has read of one sample, and what it has not yet."""

    def __init__(self, head: EagleHead) -> None:
        self.cache = DynamicCache(config=head.config)
        self.length = 0
        self.features: list[torch.Tensor] = []
        self.tokens: list[int] = []


class EagleDrafter(Drafter):
    """Drafts trees with a head, sample by sample, each with its own cache of true features.

    Args:
        head: the head.
        embed, output: of the target.
        plant: begins a tree with the head's logits behind the last committed token.
        depth: how often the tree is expanded, at most.
    """

    needs = frozenset({"hidden-states"})
    tree = True
    costly = True

    def __init__(
        self,
        head: EagleHead,
        embed: Embed,
        output: Output,
        plant: Callable[[torch.Tensor], Growth],
        depth: int,
    ) -> None:
        self.head = head
        self.embed = embed
        self.output = output
        self.plant = plant
        self.depth = depth
        self.readers: dict[int, _Reader] = {}

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """Nothing is read yet."""
        self.readers = {row.index: _Reader(self.head) for row in rows}

    def observe(self, row: Row, verified: Verified) -> None:
        """Keep the true features of what was committed, each with the token one place further."""
        assert verified.hidden_states is not None
        features = verified.hidden_states[-1]
        tokens = row.tokens[-len(features) :] if verified.prefill else verified.committed
        places = [0, *(node + 1 for node in verified.path)][: len(tokens)]
        reader = self.readers[row.index]
        reader.features.append(features[-len(tokens) :] if verified.prefill else features[places])
        reader.tokens += tokens

    def propose_row(self, row: Row) -> Draft:
        """Read the true features, grow a tree on predicted ones, and forget those."""
        reader = self.readers[row.index]
        features = torch.cat(reader.features)
        count = len(features)
        seen = torch.ones(count, count, dtype=torch.bool).tril() if reader.length else None
        features = self._read(reader, features, torch.tensor(reader.tokens), torch.arange(count), seen)[-1:]
        reader.length += count
        reader.features, reader.tokens = [], []
        growth = self.plant(self.output(features)[0])
        fed = 0
        for level in range(min(self.depth, row.limit - 1)):
            count = len(growth.tokens)
            if not count:
                break
            positions = torch.full((count,), level)  # nodes of one level share a position
            features = self._read(reader, features[growth.sources], growth.tokens, positions, growth.mask)
            fed += count
            growth.expand(self.output(features))
        if fed:
            reader.cache.crop(-fed)
        return growth.draft()

    def _read(
        self,
        reader: _Reader,
        features: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predicted features ``[n, hidden]``, from features and tokens ``[n]``.

        ``positions [n]`` count from what was verified. ``seen [n, m]`` says which drafted tokens each one attends to;
        ``None`` = those before it.
        """
        device = features.device
        mask = None
        if seen is not None:
            kind = self.head.fuse.weight.dtype
            mask = torch.zeros(1, 1, len(seen), reader.length + seen.shape[1], dtype=kind, device=device)
            mask[..., reader.length :].masked_fill_(~seen.to(device), torch.finfo(kind).min)
        embedded = self.embed(tokens.to(device).unsqueeze(0))
        positions = (positions + reader.length).to(device)
        return self.head(features.unsqueeze(0), embedded, positions, mask, reader.cache)[0]

    def stop(self) -> None:
        """Release the caches."""
        self.readers = {}
