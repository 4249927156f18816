"""Which layers, or halves of layers, can a decoder do without? Losses without each of them, and a greedy search.

A block that leaves is bypassed: the residual stream passes it unchanged. Nothing is rebuilt to try that out. One batch
of calibration windows walks up the decoder; before every candidate it takes the rest of the way once without the
candidate, and its loss there is the candidate's. So the layers below a candidate run once for all candidates, which
halves the work of trying them one by one and gives the same numbers, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

from zoo.engines.statistics import Progress
from zoo.engines.stepping import evaluating, forward_replaced, layer_arguments, moved, run_layer
from zoo.engines.surgery import Block
from zoo.errors import BadInput, RunFailed
from zoo.models.anatomy import Decoder, DecoderLayer


def whole_layers(decoder: Decoder) -> list[Block]:
    """All layers, in the order in which they run."""
    return [Block(index) for index in range(len(decoder.layers))]


def half_layers(decoder: Decoder) -> list[Block]:
    """The attention and the feed-forward block of all layers that have one, in the order in which they run."""
    blocks = []
    for index, layer in enumerate(decoder.layers):
        if layer.attention.heads:
            blocks.append(Block(index, "attention"))
        if layer.mlp.width:
            blocks.append(Block(index, "mlp"))
    return blocks


def run_blocks(
    decoder: Decoder, blocks: Sequence[Block], hidden: torch.Tensor, arguments: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """Send ``hidden [batch, tokens, hidden]`` through ``blocks``, which are in running order, and no others.

    ``arguments`` are those of ``layer_arguments``, for every layer of the decoder.
    """
    for index, group in groupby(blocks, key=lambda block: block.index):
        layer, parts = decoder.layers[index], {block.part for block in group}
        with ExitStack() as undo:
            if "layer" not in parts and "attention" not in parts:
                undo.enter_context(silent_attention(layer))
            if "layer" not in parts and "mlp" not in parts:
                undo.enter_context(silent_mlp(layer))
            hidden = run_layer(layer.module, hidden, arguments[index])
    return hidden


def silent_attention(layer: DecoderLayer) -> AbstractContextManager[None]:
    """Let the attention branch add nothing: a norm behind it, where there is one, keeps zeros at zero."""

    def nothing(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None

    return forward_replaced(layer.attention.module, nothing)


def silent_mlp(layer: DecoderLayer) -> AbstractContextManager[None]:
    """Let the feed-forward branch add nothing."""
    return forward_replaced(layer.mlp.module, torch.zeros_like)


def next_token_losses(decoder: Decoder, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each sequence's tokens given those before, in float32.

    Args:
        decoder: gives the LM head.
        hidden: output of the final norm ``[batch, tokens, hidden]``.
        input_ids: ``[batch, tokens]``.

    Returns:
        ``[batch]``, natural logarithm.
    """
    assert decoder.head is not None
    losses = []
    # One sequence at a time: logits are as wide as the vocabulary.
    for states, ids in zip(hidden, input_ids, strict=True):
        logits = decoder.head(states[:-1]).float()
        losses.append(functional.cross_entropy(logits, ids[1:].to(logits.device)))
    return torch.stack(losses)


@torch.no_grad()
def losses_without(
    decoder: Decoder, blocks: Sequence[Block], candidates: Sequence[Block], input_ids: torch.Tensor
) -> torch.Tensor:
    """Next-token loss of each sequence when one candidate leaves.

    Args:
        decoder: left as it is.
        blocks: what runs, in running order.
        candidates: some of ``blocks``, in any order.
        input_ids: one batch of calibration windows ``[batch, tokens]``.

    Returns:
        ``[candidates, batch]`` float32, on the CPU.
    """
    ids = input_ids.to(decoder.embed.weight.device)
    hidden, arguments = layer_arguments(decoder, ids)
    found: dict[Block, torch.Tensor] = {}
    for place, block in enumerate(blocks):
        if block in candidates:
            without = run_blocks(decoder, blocks[place + 1 :], hidden, arguments)
            found[block] = next_token_losses(decoder, decoder.norm(without), ids).cpu()
        if len(found) == len(candidates):
            break
        hidden = run_blocks(decoder, [block], hidden, arguments)
    return torch.stack([found[block] for block in candidates])


@dataclass(frozen=True)
class Removal:
    """One step of a search: what left, and what every candidate scored, in the order in which they were compared."""

    block: Block
    scores: dict[Block, float]


def greedy_search(
    decoder: Decoder,
    blocks: Sequence[Block],
    count: int,
    windows: torch.Tensor,
    *,
    candidates: Callable[[list[Block]], list[Block]],
    score: Callable[[torch.Tensor], float],
    batch: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> list[Removal]:
    """Take out ``count`` blocks one by one, each time the one that is missed least given all earlier removals.

    Args:
        decoder: left as it is; the caller removes what is found.
        blocks: what may stay, in running order.
        count: how many leave.
        windows: calibration ids ``[windows, tokens]``, two tokens or more.
        candidates: from the blocks that are left to those that may leave now. Of equal scores the first one wins.
        score: from the next-token losses of all windows ``[windows]`` without a block to its score; lowest leaves.
        batch: windows run at once. It changes speed and memory only.
        device: where the whole model runs meanwhile; ``None`` for where it is.
        progress: called with finished and total batches.

    Returns:
        One ``Removal`` per step.

    Raises:
        BadInput: windows are too short.
        RunFailed: no loss is finite.
    """
    if windows.shape[1] < 2:
        raise BadInput("a next-token loss needs calibration windows of two tokens or more")
    assert decoder.head is not None
    left, removals = list(blocks), []
    batches = windows.split(batch)
    target = torch.device(device) if device is not None else decoder.embed.weight.device
    with evaluating(decoder.module), moved(decoder.module, target), moved(decoder.head, target):
        for step in range(count):
            choice = candidates(left)
            losses = []
            for number, ids in enumerate(batches, start=1):
                losses.append(losses_without(decoder, left, choice, ids))
                if progress is not None:
                    progress(step * len(batches) + number, count * len(batches))
            scores = {
                block: score(row) for block, row in zip(choice, torch.cat(losses, 1).double(), strict=True)
            }
            best = min(choice, key=lambda block: scores[block] if math.isfinite(scores[block]) else math.inf)
            if not math.isfinite(scores[best]):
                raise RunFailed(
                    "no calibration loss is finite, so nothing was pruned; load the model in float32 or bfloat16, and "
                    "check that its weights are finite"
                )
            removals.append(Removal(best, scores))
            left.remove(best)
    return removals
