"""A tiny model that has learnt a rule, so that drafting heads have something to learn from it."""

from __future__ import annotations

from functools import cache

import torch
from decoders import VOCABULARY, build, plain
from torch.nn import functional

from zoo.engines.draft_heads import HeadText
from zoo.engines.language_modelling import TokenExample
from zoo.models import LoadedModel


@cache
def taught() -> LoadedModel:
    """A model that continues every text along one fixed cycle through most of its vocabulary."""
    loaded = build(num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    cycle = torch.randperm(VOCABULARY - 3, generator=generator) + 3
    texts = torch.stack([cycle.roll(shift)[:16] for shift in range(len(cycle))])
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(60):
        logits = loaded.model(texts).logits[:, :-1]
        optimizer.zero_grad()
        functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).backward()
        optimizer.step()
    for parameter in loaded.model.parameters():
        parameter.grad = None
    return loaded


def own_text(loaded: LoadedModel, count: int = 48) -> HeadText:
    """What the model itself writes, greedily, behind random beginnings."""
    generator = torch.Generator().manual_seed(1)
    beginnings = torch.randint(3, VOCABULARY, (count, 4), generator=generator)
    with torch.no_grad():
        written = plain(loaded, beginnings, max_new_tokens=20).tolist()
    examples = [TokenExample(tuple(row), 4) for row in written]
    return HeadText(examples[4:], examples[:4], 0, loaded.device)
