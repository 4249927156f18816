"""Tiny random models and drafters that guess well or badly on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from zoo.engines.decoding import Step
from zoo.engines.drafting import Context, Draft, Drafter, Row
from zoo.families.decoding import AppliedDecoder, Decoder
from zoo.models import LoadedModel

VOCABULARY = 40
PAD, EOS = 0, 2


def build(
    kind: str = "gqa", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> LoadedModel:
    """``mha``, ``gqa`` (two query heads per KV head) or ``sliding`` (a window of 8)."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "mha" else 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    } | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "sliding":
            model: Any = MistralForCausalLM(MistralConfig(sliding_window=8, **fields))
        else:
            model = LlamaForCausalLM(LlamaConfig(**fields))
    return LoadedModel(model.eval().to(dtype))


class Oracle(Drafter):
    """Knows the right continuation of every prompt and spoils some of it; as chains, or among the nodes of a tree.

    ``truth`` maps a row to prompt and continuation. Trees are random: every node hangs on any earlier one, nodes come
    in any topological order, siblings may repeat a token.
    """

    def __init__(
        self, truth: Sequence[Sequence[int]], right: float, *, tree: bool, nodes: int = 12, seed: int = 0
    ):
        self.truth = truth
        self.right = right
        self.tree = tree
        self.nodes = nodes
        self.random = random.Random(seed)
        self.closed = 0
        self.stopped = 0

    def propose_row(self, row: Row) -> Draft:
        after = list(self.truth[row.index][len(row.tokens) :])
        tokens: list[int] = []
        parents: list[int] = []
        depth: list[int] = []
        for node in range(self.random.randint(0, self.nodes)):
            parent = self.random.randint(-1, node - 1) if self.tree else node - 1
            level = 0 if parent < 0 else depth[parent] + 1
            guess = after[level] if level < len(after) else self.random.randrange(VOCABULARY)
            tokens.append(guess if self.random.random() < self.right else self.random.randrange(VOCABULARY))
            parents.append(parent)
            depth.append(level)
        return Draft(tokens, parents if self.tree else None)

    def stop(self) -> None:
        self.stopped += 1

    def close(self) -> None:
        self.closed += 1


class Fixed(Drafter):
    """Proposes what a function says."""

    def __init__(self, propose: Callable[[Context, Row], Draft], *, tree: bool = False) -> None:
        self.say = propose
        self.tree = tree

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        self.context = context

    def propose_row(self, row: Row) -> Draft:
        return self.say(self.context, row)


class Plugged(Decoder):
    """A decoder around any drafter."""

    slug = "plugged"
    plug: Any = Field(exclude=True)

    def drafter(self, loaded: LoadedModel, **resources: Any) -> Drafter:
        return self.plug


def plug(
    loaded: LoadedModel, drafter: Drafter, on_step: Callable[[Step], None] | None = None
) -> AppliedDecoder:
    return Plugged(plug=drafter).apply(loaded, on_step=on_step)


def prompts(batch: int = 1, length: int = 14, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def left_padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, longest]`` from 1-D prompts."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]
    )
    return ids, mask


def plain(loaded: LoadedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return loaded.model.generate(input_ids=ids, **({"do_sample": False} | options))
