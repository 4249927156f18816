"""Shortening the sequence of an encoder while it runs.

A method declares *stages*: before, between (after attention, before the MLP) or after the two halves of a block, where
it looks at the tokens and returns a reduction. This engine runs each block as its two halves, applies the reductions,
and keeps what belongs to the shorter sequence in step: token sizes, the padding mask, the map back to the original
tokens. Attention stays in the model's own kernel; a method may add a bias per key, e.g. the log of token sizes, or
compute attention itself, when what it edits is the map.

While a reducer is installed, block *instances* have a ``forward`` of their own; ``close`` takes it away. Classes are
never touched, and hooks on blocks and attention modules (also those that record hidden states) work as before. All
state of an input lives in a pass that begins with the first block and ends with the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from zoo.engines.latest_input import RecordsLatest
from zoo.engines.probes import Seen, tap_attention
from zoo.engines.provenance import Trace, share
from zoo.engines.reductions import Blend, Join, Keep, Merge, Reduction
from zoo.errors import BadInput, Refused, RunFailed
from zoo.models.anatomy import Encoder, EncoderBlock

Place = Literal["before", "between", "after"]


@dataclass
class _Pass:
    """One input on its way through the blocks."""

    trace: Trace
    padding: torch.Tensor | None
    """``[B, N]`` bool of the original sequence, ``False`` = padding; ``None`` = no padding."""
    valid: torch.Tensor | None
    """The same for the sequence as it is now."""
    index: int = 0
    """The block that must come next."""
    size: torch.Tensor | None = None
    seen: Seen | None = None
    entering: torch.Tensor | None = None
    """Tokens that enter the attention under way, ``[B, N, D]``."""
    shorter: bool = False
    """The sequence is no longer the one that the given mask belongs to."""
    places: torch.Tensor | None = None
    """Where each token stands in the original sequence, ``[B, N]``: a merged one at its anchor. Only kept for encoders
    with relative positions; ``None`` = nothing has moved."""
    tokens: list[int] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockView:
    """What a method may look at, for the whole batch.

    Attributes:
        tokens: hidden states at this place, ``[B, N, D]``.
        block: number of the block.
        prefix: tokens at the beginning that are no patches: [CLS], distillation token, registers.
        valid: ``[B, N]`` bool, ``False`` = padding; ``None`` = no padding.
        memory: the method's own notes about this input; empty when the first block begins.
    """

    tokens: torch.Tensor
    block: int
    prefix: int
    valid: torch.Tensor | None
    memory: dict[str, Any]
    _size: torch.Tensor | None = None
    _seen: Seen | None = None

    @property
    def sizes(self) -> torch.Tensor:
        """How many original tokens each token stands for, ``[B, N]`` in float32; padding counts 0."""
        size = self._size
        if size is None:
            size = torch.ones(self.tokens.shape[:2], device=self.tokens.device)
        return size if self.valid is None else size * self.valid

    @property
    def merged(self) -> bool:
        """True when some token may stand for several."""
        return self._size is not None

    @property
    def seen(self) -> Seen:
        """Queries, keys and values of this block's attention.

        Raises:
            ValueError: the stage does not observe, or the tokens have been reduced since.
        """
        if self._seen is None:
            raise ValueError(
                f"the attention of block {self.block} was not observed, or its tokens have changed since"
            )
        return self._seen

    @property
    def mean_key(self) -> torch.Tensor:
        """Keys averaged over the heads, ``[B, N, d]`` in float32, without gradient."""
        return self.seen.key.detach().mean(1, dtype=torch.float32)

    def behind_prefix(self, patches: torch.Tensor) -> torch.Tensor:
        """Positions of the prefix, then of ``patches [B, K]``, which count from the prefix on: ``[B, prefix + K]``."""
        head = torch.arange(self.prefix, device=patches.device).expand(len(patches), -1)
        return torch.cat((head, patches + self.prefix), dim=1)

    def received(self) -> torch.Tensor:
        """Attention that each token receives, averaged over heads and queries: ``[B, N]`` in float32.

        Rows are computed a few at a time, so that no full map exists.
        """
        batch, tokens = self.tokens.shape[:2]
        counted = (
            torch.ones(batch, tokens, device=self.tokens.device) if self.valid is None else self.valid.float()
        )
        total = torch.zeros(batch, tokens, device=self.tokens.device)
        for rows in torch.arange(tokens, device=self.tokens.device).split(max(1, min(64, tokens // 4))):
            total += (counted[:, rows, None] * self.attention(rows).mean(1)).sum(1)
        return total / counted.sum(1, keepdim=True)

    def attention(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Attention that the queries ``rows`` (positions) pay to all keys.

        Returns:
            ``[B, H, R, N]`` in float32, without the noise of attention dropout.
        """
        seen = self.seen
        # Scaled before the product, and the mask added in place: a map is the largest tensor here.
        query, key = seen.query[:, :, rows].float() * seen.scaling, seen.key.float()
        batch, heads, count, _ = query.shape
        grouped = query.unflatten(1, (key.shape[1], -1))
        scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).view(batch, heads, count, -1)
        mask = seen.mask
        if mask is None:
            return scores.softmax(-1)
        if mask.dim() == 2:
            mask = mask[:, None, None].bool()
        mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
        if mask.dtype == torch.bool:
            return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        return scores.add_(mask).softmax(-1)


@dataclass(frozen=True)
class BlockStage:
    """Where tokens leave.

    Attributes:
        block: number of the block.
        reduce: called once per input with the whole batch; ``None`` leaves the tokens as they are.
        place: before the block, between attention and MLP, or after the block.
        observes: the attention of this block is shown to ``reduce`` (not ``before``).
    """

    block: int
    reduce: Callable[[BlockView], Reduction | None]
    place: Place = "between"
    observes: bool = False


class BlockReducer(RecordsLatest[_Pass]):
    """Installs ``stages`` on the blocks of an encoder; ``close`` removes them.

    Args:
        encoder: where the blocks are.
        stages: at most one for each place.
        name: who reduces, for messages.
        key_bias: bias on the attention logits of each key, ``[B, N]``, or ``None`` for none; asked before the
            attention of every block.
        counts: keep track of token sizes (else they count as one).
        attend: what stands for the kernel in the attention of every block, from a view that has observed it; returns
            ``[B, N, H, d]``. ``None`` = the model's own kernel.
        restore: block after which every original position gets the value of the token that holds it (dropped ones:
            zero); no stage may lie behind it.

    Raises:
        Refused: the blocks have a replaced ``forward`` already, or an attention kernel that takes no bias.
    """

    def __init__(
        self,
        encoder: Encoder,
        stages: Sequence[BlockStage],
        name: str,
        key_bias: Callable[[BlockView], torch.Tensor | None] | None = None,
        counts: bool = False,
        restore: int | None = None,
        attend: Callable[[BlockView], torch.Tensor] | None = None,
    ) -> None:
        self.encoder = encoder
        self.name = name
        self._stages = {(stage.block, stage.place): stage for stage in stages}
        if len(self._stages) != len(stages):
            raise ValueError("two stages stand at the same place")
        self._key_bias = key_bias
        self._counts = counts
        self._attend = attend
        self._restore = restore
        self._passes: deque[_Pass] = deque(maxlen=4)
        """Inputs under way: one, unless a hook runs the encoder again, or an earlier input was interrupted."""
        self._undo: list[Callable[[], None]] = []
        kernel = getattr(encoder.config, "_attn_implementation", None)
        if key_bias is not None and kernel not in ("sdpa", "eager"):
            raise Refused(
                f"{name} biases attention logits, which the '{kernel}' kernel cannot take: load the model with "
                "attn_implementation='sdpa', or turn the bias off"
            )
        if any("forward" in vars(block.module) for block in encoder.blocks):
            raise Refused(
                f"{name} cannot be applied: something else has replaced the forward of the encoder's blocks (close "
                "the method that is at work, or load the model without offloading)"
            )
        try:
            for index, block in enumerate(encoder.blocks):
                self._install(index, block)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the blocks their own forward back; harmless when done twice. What was recorded stays readable."""
        while self._undo:
            self._undo.pop()()
        self._passes.clear()

    # --- what happened to the latest input -----------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """Tokens that reached the attention of each block, and at the end those that left the last one.

        Raises:
            BadInput: no input has run yet.
        """
        return self._finished.tokens

    @property
    def entered(self) -> int:
        """Tokens of the sequence before any reduction."""
        return self._finished.trace.tokens

    @property
    def left(self) -> int:
        """Tokens after the last reduction (before any restoring)."""
        return self._finished.trace.length

    @property
    def memory(self) -> dict[str, Any]:
        """What the method noted about the latest input."""
        return self._finished.memory

    @property
    def sources(self) -> torch.Tensor:
        """How much of each input token is in each output token, ``[B, N_out, N_in]`` (prefix included).

        See :meth:`zoo.engines.provenance.Trace.sources`.
        """
        return self._finished.trace.sources()

    @property
    def patch_sources(self) -> torch.Tensor:
        """``sources`` without the prefix on either side, ``[B, n_out, n_in]``."""
        return self.sources[:, self.encoder.prefix :, self.encoder.prefix :]

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """Spread output tokens over the positions they came from: ``y [B, N_out, D]`` -> ``[B, N_in, D]``.

        See :meth:`zoo.engines.provenance.Trace.spread`.

        Raises:
            BadInput: ``y`` does not have the length of the reduced sequence.
        """
        trace = self._finished.trace
        if y.dim() != 3 or y.shape[1] != trace.length:
            raise BadInput(
                f"unmerge takes [batch, {trace.length}, dim] (one row for each token that {self.name} left), "
                f"not {list(y.shape)}"
            )
        return trace.spread(y)

    # --- running a block -----------------------------------------------------------------------------------------

    def _install(self, index: int, block: EncoderBlock) -> None:
        module = block.module
        module.forward = partial(self._forward, index, block)
        self._undo.append(partial(vars(module).pop, "forward", None))
        places: tuple[Place, ...] = ("between", "after")
        looks = any(stage.observes for place in places if (stage := self._stages.get((index, place))))
        if looks or self._attend is not None:
            self._undo.append(tap_attention(block.attention.module, self._see))

    def _see(self, seen: Seen) -> torch.Tensor | None:
        current = self._passes[-1]
        current.seen = seen
        restored = self._restore is not None and current.index > self._restore
        if self._attend is None or restored:
            return None
        assert current.entering is not None
        return self._attend(self._view(current, current.index, current.entering))

    def _forward(
        self,
        index: int,
        block: EncoderBlock,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """Stands for the forward of a block: ``hidden_states [B, N, D]`` -> ``[B, N', D]``."""
        if block.module.training and getattr(block.module, "gradient_checkpointing", False):
            raise BadInput(
                f"{self.name} does not work with gradient checkpointing: turn it off to train with {self.name}"
            )
        current = self._enter(index, hidden_states, attention_mask)
        if block.pair_bias is not None:
            attention_mask = block.pair_bias(current.trace.tokens, attention_mask, arguments)
        try:
            x = self._reduce(current, index, "before", hidden_states)
            current.tokens.append(x.shape[1])
            mask = self._mask(current, index, x, attention_mask)
            current.entering = x
            attended, _ = block.attention.module(block.norm1(x), attention_mask=mask, **arguments)
            current.entering = None
            x = _drop(block, block.scale1(attended)) + x
            x = self._reduce(current, index, "between", x)
            x = _drop(block, block.scale2(block.mlp(block.norm2(x)))) + x
            x = self._reduce(current, index, "after", x)
            if index == self._restore and current.trace:
                x = current.trace.spread(x)
                current.size, current.valid, current.shorter = None, current.padding, False
                current.places = None
        except BaseException:
            self._end(current)
            raise
        self._leave(current, x)
        return x

    def _enter(self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None) -> _Pass:
        if index == 0:
            positions = self.encoder.blocks[0].pair_bias is not None  # then the mask speaks of those
            hides = None if positions or not self._stages else mask
            padding = None if hides is None else _key_mask(hides, hidden, self.name)
            trace = Trace(hidden.shape[0], hidden.shape[1], hidden.device)
            self._passes.append(_Pass(trace, padding, padding))
        # Passes that stopped half-way (an exception in somebody's hook) lie on top and wait for another block.
        while self._passes and self._passes[-1].index != index:
            self._passes.pop()
        if not self._passes:
            raise RunFailed(
                f"{self.name}: block {index} was called outside a forward pass of the whole encoder"
            )
        return self._passes[-1]

    def _leave(self, current: _Pass, hidden: torch.Tensor) -> None:
        current.seen = None
        current.index += 1
        if current.index == len(self.encoder.blocks):
            self._end(current)
            current.tokens.append(hidden.shape[1])
            self._latest = current

    def _end(self, current: _Pass) -> None:
        """Forget an input, and what a hook left unfinished on top of it."""
        while self._passes and self._passes.pop() is not current:
            pass

    def _view(self, current: _Pass, index: int, hidden: torch.Tensor) -> BlockView:
        prefix = self.encoder.prefix
        return BlockView(hidden, index, prefix, current.valid, current.memory, current.size, current.seen)

    def _reduce(self, current: _Pass, index: int, place: Place, hidden: torch.Tensor) -> torch.Tensor:
        stage = self._stages.get((index, place))
        reduction = None if stage is None else stage.reduce(self._view(current, index, hidden))
        if reduction is None:
            return hidden
        current.shorter = True
        current.seen = None
        current.trace.add(reduction)
        if self.encoder.blocks[index].pair_bias is not None:
            anchor, places = reduction.anchor, current.places
            current.places = anchor if places is None else places.gather(1, anchor)
        self._recount(current, reduction, hidden)
        return reduction.apply(hidden)

    def _recount(self, current: _Pass, reduction: Reduction, hidden: torch.Tensor) -> None:
        """Bring sizes and padding to the new length."""
        if self._counts and (
            isinstance(reduction, Blend) or (isinstance(reduction, Merge | Join) and reduction.normalise)
        ):
            current.size = reduction.sizes()  # weighted with the sizes before
        elif self._counts and not (isinstance(reduction, Keep) and current.size is None):
            before = current.size
            before = torch.ones(hidden.shape[:2], device=hidden.device) if before is None else before
            current.size = share(reduction, before)
        if current.valid is not None:
            # A merged token is visible when any of its members is.
            current.valid = share(reduction, current.valid.float()) > 0
        if isinstance(reduction, Keep) and reduction.valid is not None:
            current.valid = reduction.valid if current.valid is None else current.valid & reduction.valid

    def _mask(
        self, current: _Pass, index: int, hidden: torch.Tensor, given: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The mask of this block's attention: the very object that was given while there is nothing to change."""
        bias = None if self._key_bias is None else self._key_bias(self._view(current, index, hidden))
        valid = current.valid
        if bias is None and not current.shorter:
            return given
        pairs = None if self.encoder.blocks[index].pair_bias is None else given
        if pairs is None and bias is None and (valid is None or self._flash):
            return valid
        mask = hidden.new_zeros(hidden.shape[:2]) if bias is None else bias.to(hidden.dtype)
        if valid is not None:
            mask = mask.masked_fill(~valid, torch.finfo(mask.dtype).min)
        mask = mask[:, None, None, :]
        return mask if pairs is None else mask + _at_places(pairs, current.places)

    @property
    def _flash(self) -> bool:
        return "flash" in str(getattr(self.encoder.config, "_attn_implementation", ""))


def _at_places(pairs: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """A bias for each two positions, ``pairs [1 or B, H, N, N]``, of those at ``places [B, K]``: ``[B, H, K, K]``."""
    if places is None:
        return pairs
    pairs = pairs.expand(len(places), -1, -1, -1)
    samples = torch.arange(len(places), device=places.device)[:, None, None]
    return pairs[samples, :, places.unsqueeze(2), places.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def _drop(block: EncoderBlock, x: torch.Tensor) -> torch.Tensor:
    return x if block.drop is None else block.drop(x)


def _key_mask(mask: torch.Tensor, hidden: torch.Tensor, name: str) -> torch.Tensor | None:
    """``[B, N]`` bool of the keys that may be seen, from the mask that a block was given; ``None`` = all of them."""
    if mask.dim() == 4:
        if mask.shape[2] > 1 and not bool((mask == mask[:, :, :1]).all()):
            raise Refused(f"{name} cannot shorten a sequence whose attention mask differs between queries")
        mask = mask[:, 0, 0]
        valid = mask if mask.dtype == torch.bool else mask == 0  # additive
    else:
        valid = mask.bool()
    return None if bool(valid.all()) else valid.expand(hidden.shape[:2])
