"""A sequence that has lost tokens, and what belongs to it: places, positions, masks, and the weight of its keys.

Everything here is index work on tensors; :mod:`zoo.engines.tokens` decides when it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from zoo.engines.provenance import share
from zoo.engines.reductions import Keep, Reduction
from zoo.engines.views import View


@dataclass
class Segment:
    """The sequence as layers from ``first`` on see it.

    Attributes:
        columns: original place of each token, ``[B, L]``.
        valid: real tokens (False = padding), ``[B, L]``.
        visual: visual tokens, ``[B, L]``.
        shift: how far the positions of later tokens have moved, ``[B]``.
        renumbered: positions of its tokens ``[B, L]``, when a stage has renumbered them; ``None`` = the original ones.
        weight: how many tokens each key counts for, ``[B, L]`` float32; ``None`` = one.
    """

    first: int
    columns: torch.Tensor
    valid: torch.Tensor
    visual: torch.Tensor
    shift: torch.Tensor
    renumbered: torch.Tensor | None = None
    inside: bool = False
    """A stage inside the decoder renumbered: what the decoder made for all its layers is wrong here."""
    ordered: bool = True
    """Its tokens stand in the order in which the decoder's own mask has them."""
    weight: torch.Tensor | None = None
    step: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """Arguments of the running forward pass, already cut, by the identity of the originals."""


@dataclass
class Row:
    """The new sequence of one sample: for each token the current place it takes, and whether it is visual."""

    place: torch.Tensor
    visual: torch.Tensor
    combine: Callable[[torch.Tensor], torch.Tensor] | None
    """Old values of the visual tokens ``[N, D]`` to new ones ``[K, D]``, in sequence order; ``None`` = unchanged."""
    add_up: Callable[[torch.Tensor], torch.Tensor] | None
    """Old weights of the visual tokens ``[N]`` to new ones ``[K]``; ``None`` = unchanged."""
    before: torch.Tensor
    """Places of the visual tokens before, ``[N]``."""

    @property
    def ascends(self) -> bool:
        """True when nobody has overtaken anybody."""
        return bool((self.place.diff() > 0).all())


def arrange(reduction: Reduction, view: View) -> Row:
    """Order of the surviving tokens: text stays in place, visual tokens keep the reduction's order in their block.

    Attention is causal in this order, also where a reduction changes it.
    """
    if reduction.anchor.shape[0] != 1:
        raise ValueError("a stage reduces one sample at a time: the reduction must have a batch of one")
    anchor = view.index[reduction.anchor[0]]
    # A block is a run of neighbouring visual tokens; all its survivors sort to where the block began.
    breaks = torch.ones_like(view.index)
    breaks[1:] = (view.index[1:] - view.index[:-1] != 1).long()
    starts = view.index[breaks.bool()][breaks.cumsum(0) - 1]
    place = torch.cat((anchor, view.text_index))
    order = torch.cat((starts[reduction.anchor[0]], view.text_index)).argsort(stable=True)
    visual = order < len(anchor)
    if isinstance(reduction, Keep):
        return Row(place[order], visual, None, None, view.index)
    chosen = order[visual]

    def combine(x: torch.Tensor) -> torch.Tensor:
        return reduction.apply(x.unsqueeze(0))[0][chosen]

    def add_up(weight: torch.Tensor) -> torch.Tensor:
        return share(reduction, weight.unsqueeze(0))[0][chosen].clamp(min=1)

    return Row(place[order], visual, combine, add_up, view.index)


def assemble(
    first: int, before: Segment, tokens: torch.Tensor, rows: list[Row], *, renumber: bool, weigh: bool
) -> tuple[Segment, torch.Tensor]:
    """Left-pad the rows to one length.

    Args:
        first: the layer in front of which this happens; -1 = before the LLM.
        before: the sequence so far.
        tokens: length of each prompt, without padding, ``[B]``.
        rows: the new sequence of each sample.
        renumber: count positions anew.
        weigh: from here on a key counts for all tokens that were merged into it.

    Returns:
        The new segment, and the current place of each of its tokens ``[B, L]``.
    """
    device = before.columns.device
    length = max(len(row.place) for row in rows)
    index = torch.zeros(len(rows), length, dtype=torch.long, device=device)
    valid = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    visual = torch.zeros_like(valid)
    for sample, row in enumerate(rows):
        pad = length - len(row.place)
        index[sample, pad:] = row.place
        valid[sample, pad:] = True
        visual[sample, pad:] = row.visual
    segment = Segment(first, before.columns.gather(1, index), valid, visual, before.shift)
    if renumber:
        segment.shift = tokens - valid.sum(1)
        segment.renumbered = (valid.long().cumsum(1) - 1).clamp(min=0)
        segment.inside = first >= 0
    else:
        segment.renumbered = None if before.renumbered is None else before.renumbered.gather(1, index)
        segment.inside = before.inside
    # Before the LLM the decoder has yet to make its mask, for the new order.
    segment.ordered = first < 0 or (before.ordered and all(row.ascends for row in rows))
    if weigh or before.weight is not None:
        earlier = torch.ones(before.columns.shape, device=device) if before.weight is None else before.weight
        segment.weight = reduced(earlier, rows, index, segment, lambda row: row.add_up)
    return segment, index


def reduced(
    x: torch.Tensor,
    rows: list[Row],
    index: torch.Tensor,
    segment: Segment,
    rule: Callable[[Row], Callable[[torch.Tensor], torch.Tensor] | None] = lambda row: row.combine,
) -> torch.Tensor:
    """``x [B, N, ...]`` on the shorter sequence, ``[B, L, ...]``; ``rule`` says what becomes of visual tokens."""
    short = gather_rows(x, index)
    for sample, row in enumerate(rows):
        made = rule(row)
        if made is not None:
            short[sample, segment.visual[sample]] = made(x[sample, row.before]).to(x.dtype)
    return short


def trimmed(own: Segment, target: Segment, first: int) -> Segment:
    """The tokens of ``target``, with the positions and weights that they have in ``own``, for layers from ``first``."""
    index = locate(target.columns, own.columns)
    return replace(
        target,
        first=first,
        shift=own.shift,
        renumbered=None if own.renumbered is None else own.renumbered.gather(1, index),
        inside=own.inside,
        weight=None if own.weight is None else own.weight.gather(1, index),
        step={},
    )


def cut_cache(layer: Any, index: torch.Tensor) -> None:
    """Keep the places ``index [B, L]`` of one layer's keys and values, ``[B, H_kv, N, d]``."""
    for name in ("keys", "values"):
        full = getattr(layer, name)
        places = index[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
        setattr(layer, name, full.gather(2, places))


# --- positions --------------------------------------------------------------------------------------------------


def positions_of(segment: Segment, given: torch.Tensor | None) -> torch.Tensor:
    """Position ids of a segment's tokens, ``[B, L]``; time, row and column ``[3, B, L]`` for places in image grids.

    Args:
        segment: of the prompt.
        given: what the decoder was called with, ``[B or 1, N]``; ``None`` = counted. M-RoPE models have
            ``[3, B, N]``, or ``[4, B, N]`` with the place in the text in front.
    """
    if segment.renumbered is not None:
        return segment.renumbered
    if given is None:
        return segment.columns
    return gather_last(given[-3:] if given.dim() == 3 else given, segment.columns)


def locate(inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """For each original place in ``inner [B, L]`` its index in ``outer [B, M]``."""
    size = int(outer.max()) + 1
    table = torch.zeros(len(outer), size, dtype=torch.long, device=outer.device)
    table.scatter_(1, outer, torch.arange(outer.shape[1], device=outer.device).expand_as(outer))
    return table.gather(1, inner)


def gather_last(positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather ``positions [..., B or 1, N]`` (M-RoPE has leading rows) along the last dimension with ``[B, L]``."""
    shape = (*positions.shape[:-2], *index.shape)
    return positions.expand(*positions.shape[:-2], len(index), -1).gather(-1, index.expand(shape))


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x [B or 1, N, ...]`` at ``index [B, L]``."""
    x = x.expand(len(index), *x.shape[1:])
    return x.gather(1, index.reshape(*index.shape, *([1] * (x.dim() - 2))).expand(-1, -1, *x.shape[2:]))


# --- masks ------------------------------------------------------------------------------------------------------


def causal_mask(segment: Segment, queries: int, keys: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """What the last ``queries`` of ``keys`` tokens may see, ``[B, 1, Q, K]``: bool, or additive in another ``dtype``.

    Causal in the order of the sequence; the padding of the segment, with which the keys begin, is hidden.
    """
    device = segment.valid.device
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    allowed = causal & visible(segment, keys)[:, None, None, :]
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


def visible(segment: Segment, keys: int) -> torch.Tensor:
    """Real tokens among ``keys``: those of the segment, and all that came after the prompt, ``[B, K]`` bool."""
    fresh = keys - segment.valid.shape[1]
    return torch.cat((segment.valid, segment.valid.new_ones(len(segment.valid), fresh)), dim=1)


def weighed(segment: Segment, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``mask [B or 1, 1, Q, K]`` in additive form, with the logarithm of the weight of each key.

    A key that stands for ``w`` tokens then gets the attention of ``w`` equal keys (*proportional attention*).
    """
    assert segment.weight is not None
    bias = nn.functional.pad(segment.weight.log(), (0, mask.shape[-1] - segment.weight.shape[1]))
    bias = bias.to(dtype)[:, None, None, :]
    return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + bias


def cut_2d(
    mask: torch.Tensor, segment: Segment, prefix: int, local: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, prefix + fresh]`` -> ``[B, L + fresh]``."""
    index = segment.columns if local is None else local
    return torch.cat(
        (mask[:, :prefix].gather(1, index) * segment.valid.to(mask.dtype), mask[:, prefix:]), dim=1
    )


def cut_columns(mask: torch.Tensor, index: torch.Tensor, valid: torch.Tensor, prefix: int) -> torch.Tensor:
    """``[B or 1, 1, Q, prefix + fresh]`` -> ``[B, 1, Q, L + fresh]``, hiding padding columns."""
    mask = mask.expand(len(index), -1, -1, -1)
    columns = index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    cut = mask[..., :prefix].gather(3, columns)
    if not bool(valid.all()):
        hidden = ~valid[:, None, None, :]
        cut = (
            cut & ~hidden if cut.dtype == torch.bool else cut.masked_fill(hidden, torch.finfo(cut.dtype).min)
        )
    return torch.cat((cut, mask[..., prefix:]), dim=3)
