"""The target as its own draft model: some of its sub-layers left out, drafting on the target's own cache.

What a draft adds to the cache is taken back when it is written, in the layers that took part. The full model then
writes the entries of all layers anew, so that nothing the reduced model computed stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from zoo.engines.drafting import Context, Draft, Drafter, Row
from zoo.engines.removal_search import silent_attention, silent_mlp
from zoo.engines.stepping import forward_replaced
from zoo.engines.surgery import Block
from zoo.models.anatomy import Decoder


def halves(layers: Collection[int]) -> frozenset[Block]:
    """The attention and the feed-forward block of each of ``layers``."""
    return frozenset(Block(index, part) for index in layers for part in ("attention", "mlp"))


@contextmanager
def skipping(decoder: Decoder, blocks: Collection[Block]) -> Iterator[None]:
    """Let the model run without ``blocks`` (halves of layers), whose input passes unchanged.

    The attention of layer 0 must stay: the length of its cache tells transformers how wide a mask is.
    """

    def pass_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    with ExitStack() as undo:
        for index, layer in enumerate(decoder.layers):
            attention, mlp = (Block(index, part) in blocks for part in ("attention", "mlp"))
            # Where the residual stream is sliced, its shortcuts are matrices and the layer has to run.
            if attention and mlp and layer.attention_shortcut is None and layer.mlp_shortcut is None:
                undo.enter_context(forward_replaced(layer.module, pass_on))
                continue
            if attention:
                undo.enter_context(silent_attention(layer))
            if mlp:
                undo.enter_context(silent_mlp(layer))
        yield


Choice = Callable[[Row, list[int], torch.Tensor], tuple[int, bool]]
"""From a sample, its draft so far and the logits ``[V]`` behind it: the next token, and whether to go on."""


def write_behind(context: Context, rows: Sequence[Row], most: int, choose: Choice) -> dict[int, list[int]]:
    """Let the model, as it is now, write up to ``most`` tokens behind each of ``rows``, all in step.

    Returns:
        Tokens by ``row.index``. The cache is as before, also after an exception.
    """
    drafts: dict[int, list[int]] = {row.index: [] for row in rows}
    layers = context.cache.layers
    lengths = [layer.get_seq_length() for layer in layers]
    mask, device = context.columns(), context.model.device
    # Samples that do not draft are fed something, for the sake of the batch.
    ids = [0] * len(context.starts)
    places = [0] * len(ids)
    going = [row for row in rows if min(most, row.limit) > 0]
    try:
        while going:
            for row in going:
                draft = drafts[row.index]
                ids[row.index] = draft[-1] if draft else row.tokens[-1]
                places[row.index] = len(row.tokens) + len(draft) - 1
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(ids), 1)), dim=1)
            logits = context.model(
                input_ids=torch.tensor(ids, device=device).unsqueeze(1),
                position_ids=torch.tensor(places, device=device).unsqueeze(1),
                attention_mask=mask,
                past_key_values=context.cache,
                use_cache=True,
            ).logits[:, -1]
            still = []
            for row in going:
                draft = drafts[row.index]
                token, more = choose(row, draft, logits[row.index])
                draft.append(token)
                if more and len(draft) < min(most, row.limit):
                    still.append(row)
            going = still
    finally:
        for layer, length in zip(layers, lengths, strict=True):
            layer.crop(length - layer.get_seq_length())
    return drafts


def choices_within(context: Context, row: Row, start: int, stop: int) -> list[int]:
    """The model's argmax, as it is now, after each of ``row.tokens[start:stop]``, in one pass behind a copied cache.

    Args:
        start: from 1 to the number of tokens in the cache.
    """
    columns, device = context.columns(), context.model.device
    cache = DynamicCache(config=context.model.config.get_text_config(decoder=True))
    for index, layer in enumerate(context.cache.layers):
        if layer.get_seq_length() == 0:  # its attention was removed
            continue
        keys, values = (states[row.index : row.index + 1] for states in (layer.keys, layer.values))
        if columns is not None:
            valid = columns[row.index].nonzero().squeeze(1)
            keys, values = (states.index_select(2, valid.to(states.device)) for states in (keys, values))
        cache.update(keys[:, :, :start], values[:, :, :start], index)
    logits = context.model(
        input_ids=torch.tensor([row.tokens[start:stop]], device=device),
        position_ids=torch.arange(start, stop, device=device).unsqueeze(0),
        past_key_values=cache,
        use_cache=True,
    ).logits[0]
    best: list[int] = logits.float().argmax(-1).tolist()
    return best


class SelfDrafter(Drafter):
    """Drafts chains greedily, with the target without some of its halves of layers.

    Args:
        decoder: of the target.
        skipped: halves of layers that are left out.
        draft_tokens: longest draft.
    """

    costly = True

    def __init__(self, decoder: Decoder, skipped: Collection[Block], draft_tokens: int) -> None:
        self.decoder = decoder
        self.skipped = frozenset(skipped)
        self.draft_tokens = draft_tokens
        self.context: Context | None = None

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """A new generation: its cache is the one to draft on."""
        self.context = context

    def propose(self, rows: Sequence[Row]) -> list[Draft]:
        """Draft for all samples in the same passes."""
        assert self.context is not None
        with skipping(self.decoder, self.skipped):
            drafts = write_behind(self.context, rows, self.draft_tokens, self.choose)
        return [self.draft(row, drafts[row.index]) for row in rows]

    def choose(self, row: Row, draft: list[int], logits: torch.Tensor) -> tuple[int, bool]:
        """The likeliest token behind ``draft``, and whether to go on drafting."""
        return int(self.scores(row, draft, logits).argmax()), True

    def draft(self, row: Row, tokens: list[int]) -> Draft:
        """What is verified of the chain that was written."""
        return Draft(tokens)

    def scores(self, row: Row, draft: list[int], logits: torch.Tensor) -> torch.Tensor:
        """``logits [V]`` through the target's processors, float32."""
        assert self.context is not None
        return self.context.scores(row, draft, logits)

    def stop(self) -> None:
        """Let go of the cache."""
        self.context = None
