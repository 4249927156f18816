"""Making a model smaller: rows and columns leave, new smaller linear layers take the place of the old ones.

Nothing is ever written into an existing parameter. ``share_parameters`` copies a model's structure over the same
storage, so a pruned copy costs only what it rebuilds, and the original keeps every bit.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from zoo.models.anatomy import Attention, Decoder, LinearPart, Mlp
from zoo.models.modeling_pruned import (
    mark_layers_without_cache,
    remove_attention,
    remove_mlp,
    set_heads,
)


def share_parameters(model: nn.Module) -> Any:
    """A structural copy of ``model``: new modules and parameters over the storage of the old ones.

    Tied parameters stay tied. Replacing, moving or casting modules of the copy leaves the original alone; writing into
    a shared tensor in place (as an optimiser does) would not.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


@dataclass
class _Cut:
    """What one linear layer loses and gains; masks are ``True`` where kept, ``None`` for no change."""

    part: LinearPart
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass
class Cuts:
    """Cuts collected over linear parts, so that a layer fused of several parts is rebuilt once."""

    _cuts: dict[tuple[int, str], _Cut] = field(default_factory=dict)

    def _at(self, part: LinearPart) -> _Cut:
        return self._cuts.setdefault((id(part.owner), part.name), _Cut(part))

    def rows(self, part: LinearPart, kept: torch.Tensor) -> None:
        """Keep some outputs of ``part``: mask ``[part.out_features]``."""
        cut = self._at(part)
        if cut.rows is None:
            cut.rows = torch.ones(part.linear.out_features, dtype=torch.bool, device=kept.device)
        cut.rows[slice(*part.rows) if part.rows else slice(None)] &= kept

    def columns(self, part: LinearPart, kept: torch.Tensor) -> None:
        """Keep some inputs of the layer of ``part``: mask ``[in_features]``."""
        cut = self._at(part)
        cut.columns = kept if cut.columns is None else cut.columns & kept

    def add_bias(self, part: LinearPart, constant: torch.Tensor) -> None:
        """Add a constant ``[out_features]`` to the bias of a whole layer, which gets one if it has none."""
        cut = self._at(part)
        cut.bias = constant if cut.bias is None else cut.bias + constant

    def apply(self) -> None:
        """Rebuild every layer that changes, once."""
        for cut in self._cuts.values():
            setattr(cut.part.owner, cut.part.name, _rebuilt(cut))
        self._cuts.clear()


@torch.no_grad()
def _rebuilt(cut: _Cut) -> nn.Linear:
    old = cut.part.linear
    weight, bias = old.weight.detach(), None if old.bias is None else old.bias.detach()
    if cut.bias is not None:
        constant = cut.bias.to(weight.device, torch.float32)
        bias = (constant if bias is None else bias.float() + constant).to(weight.dtype)
    if cut.rows is not None and not bool(cut.rows.all()):
        kept = cut.rows.to(weight.device)
        weight, bias = weight[kept], None if bias is None else bias[kept]
    if cut.columns is not None and not bool(cut.columns.all()):
        weight = weight[:, cut.columns.to(weight.device)]
    new = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype
    )
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.contiguous(), requires_grad=old.weight.requires_grad)
    return new.train(old.training)


def channels_of(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Per-head mask ``[heads]`` as a mask of channels ``[heads * head_dim]``."""
    return heads.repeat_interleave(head_dim)


def keep_heads(attention: Attention, heads: torch.Tensor, output_bias: torch.Tensor | None = None) -> None:
    """Keep some query heads, and the key-value heads that still serve one.

    Args:
        attention: attention of one layer; its module is changed.
        heads: mask ``[heads]``. What stays must be the same number of query heads for every key-value head that
            stays, else shapes are not valid: with grouped queries, let whole groups leave.
        output_bias: constant ``[hidden]`` to add to the output bias, in place of what left.

    Raises:
        ValueError: the mask has another length, keeps nothing, or leaves groups of different sizes.
    """
    if heads.shape != (attention.heads,) or not bool(heads.any()):
        raise ValueError(f"a head mask needs {attention.heads} entries, at least one of them kept")
    per_group = heads.view(attention.kv_heads, attention.group).sum(1)
    groups = per_group > 0
    left = per_group[groups]
    if not bool((left == left[0]).all()):
        raise ValueError("the kept key-value groups have different numbers of query heads")
    if not bool(heads.all()):
        channels = channels_of(heads, attention.head_dim)
        cuts = Cuts()
        cuts.rows(attention.query, channels)
        for part in (attention.key, attention.value):
            cuts.rows(part, channels_of(groups, attention.head_dim))
        cuts.columns(attention.output, channels)
        if output_bias is not None:
            cuts.add_bias(attention.output, output_bias)
        cuts.apply()
        module: Any = attention.module
        set_heads(module, int(heads.sum()), int(groups.sum()), module.config)


def keep_channels(mlp: Mlp, channels: torch.Tensor, down_bias: torch.Tensor | None = None) -> None:
    """Keep some intermediate channels.

    Args:
        mlp: feed-forward block of one layer; its module is changed.
        channels: mask ``[width]``.
        down_bias: constant ``[hidden]`` to add to the bias of the down projection, in place of what left.

    Raises:
        ValueError: the mask has another length or keeps nothing.
    """
    if channels.shape != (mlp.width,) or not bool(channels.any()):
        raise ValueError(f"a channel mask needs {mlp.width} entries, at least one of them kept")
    if not bool(channels.all()):
        cuts = Cuts()
        for part in mlp.inputs:
            cuts.rows(part, channels)
        cuts.columns(mlp.down, channels)
        if down_bias is not None:
            cuts.add_bias(mlp.down, down_bias)
        cuts.apply()
        module: Any = mlp.module
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = int(channels.sum())


@dataclass(frozen=True)
class LayerCut:
    """What stays of one decoder layer, and what replaces the rest. ``None`` leaves that part alone."""

    heads: torch.Tensor | None = None
    channels: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


def cut_layers(decoder: Decoder, cuts: list[LayerCut]) -> None:
    """Apply one ``LayerCut`` per layer."""
    for layer, cut in zip(decoder.layers, cuts, strict=True):
        if cut.heads is not None:
            keep_heads(layer.attention, cut.heads, cut.output_bias)
        if cut.channels is not None:
            keep_channels(layer.mlp, cut.channels, cut.down_bias)


# --- whole layers and their halves ------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Block:
    """What may leave of the decoder's depth: layer ``index``, or only its attention or its feed-forward block."""

    index: int
    part: Literal["layer", "attention", "mlp"] = "layer"

    def __str__(self) -> str:
        return f"{self.part} {self.index}"


def remove_blocks(decoder: Decoder, blocks: Collection[Block]) -> None:
    """Remove layers, and attention or feed-forward blocks of layers.

    A layer that loses both halves leaves. What stays keeps its order; the numbers by which attention finds its place in
    the KV cache, ``num_hidden_layers`` and ``layer_types`` of the configuration follow.

    Args:
        decoder: its modules and its configuration are changed.
        blocks: numbered as in ``decoder.layers``.

    Raises:
        ValueError: there is no such layer, or no layer or no attention would be left.
    """
    count = len(decoder.layers)
    if any(not 0 <= block.index < count for block in blocks):
        raise ValueError(f"this decoder has layers 0 to {count - 1}")
    without = {part: {block.index for block in blocks if block.part == part} for part in ("attention", "mlp")}
    for index, layer in enumerate(decoder.layers):
        if not layer.attention.heads:
            without["attention"].add(index)
        if not layer.mlp.width:
            without["mlp"].add(index)
    gone = {block.index for block in blocks if block.part == "layer"}
    gone |= without["attention"] & without["mlp"]
    kept = [index for index in range(count) if index not in gone]
    if not set(kept) - without["attention"]:
        raise ValueError("a decoder needs at least one layer with attention")
    for index in kept:
        layer = decoder.layers[index]
        if index in without["attention"] and layer.attention.heads:
            remove_attention(layer.module)
        if index in without["mlp"] and layer.mlp.width:
            remove_mlp(layer.module)
    _keep_layers(decoder, kept)


def _keep_layers(decoder: Decoder, kept: list[int]) -> None:
    modules: list[Any] = [decoder.stack[index] for index in kept]
    # The list object stays: other modules may hold it.
    while len(decoder.stack):
        del decoder.stack[-1]
    for place, module in enumerate(modules):
        for part in (module, module.self_attn):
            if hasattr(part, "layer_idx"):
                part.layer_idx = place
        decoder.stack.append(module)
    config = decoder.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    mark_layers_without_cache(modules, config)


# --- single weights ---------------------------------------------------------------------------------------------


@torch.no_grad()
def replace_weights(weights: Iterable[tuple[LinearPart, torch.Tensor]]) -> None:
    """Give linears new weights ``[out, in]`` of the same shape, in new storage; biases stay.

    Raises:
        ValueError: a weight has another shape than the one it replaces.
    """
    whole: dict[tuple[int, str], tuple[LinearPart, torch.Tensor]] = {}
    for part, weight in weights:
        if weight.shape != part.weight.shape:
            raise ValueError(
                f"a new {part.name} has shape {list(weight.shape)}, not {list(part.weight.shape)}"
            )
        old = part.linear.weight
        _, new = whole.setdefault((id(part.owner), part.name), (part, old.detach().clone()))
        new[slice(*part.rows) if part.rows else slice(None)] = weight.to(old.device, old.dtype)
    for part, new in whole.values():
        linear = part.linear
        linear.weight = nn.Parameter(new, requires_grad=linear.weight.requires_grad)
