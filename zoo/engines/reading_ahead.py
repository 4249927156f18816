"""Attention that a later decoder layer would pay, found before the decoder runs.

A stage before the LLM may let the first decoder layers read the prompt, or a part of it, to learn what matters to the
question. They run on the side, around the model's own weights, at positions counted along what they are given
(places in image grids stay what they are).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from zoo.engines.upcoming import rotated, upcoming_keys, upcoming_queries
from zoo.engines.views import View
from zoo.models.anatomy import Decoder


@torch.no_grad()
def read_ahead(
    view: View, visual: torch.Tensor, decoder: Decoder, reader: list[nn.Module], scoring_layer: int
) -> torch.Tensor:
    """Attention logits of the last token to the visual tokens in one layer, when only some are in the sequence.

    Args:
        view: of a stage before the LLM.
        visual: visual tokens that are read, ``[N]`` bool; the text is read as a whole.
        decoder: norm, projections and rotary embedding of the scoring layer.
        reader: the layers before it (see :func:`without_hooks`).
        scoring_layer: its number.

    Returns:
        ``[H, N]`` float32; ``-inf`` for tokens that were not read.
    """
    own = visual.nonzero().squeeze(-1)
    places, order = torch.cat((view.index[own], view.text_index)).sort()
    hidden = torch.cat((view.tokens[own], view.text))[order].unsqueeze(0)
    positions = torch.arange(len(order), device=hidden.device)
    if view.positions.dim() > 1:
        positions = view.positions[:, places]
    rotary = None if decoder.rotary is None else decoder.rotary(hidden, position_ids=positions.unsqueeze(-2))
    mask = None
    if decoder.config._attn_implementation == "eager":  # other kernels know the causal case by themselves
        lowest = torch.finfo(hidden.dtype).min
        mask = hidden.new_full((len(order), len(order)), lowest).triu(1)[None, None]
    for number, layer in enumerate(reader):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if number < len(view.deep):
            hidden = hidden + view.deep[number][places]
    scoring = decoder.layers[scoring_layer]
    where = order.argsort()[: len(own)]
    query = rotated(decoder, upcoming_queries(scoring, hidden[0, -1:]), positions[..., -1:]).float()
    key = rotated(decoder, upcoming_keys(scoring, hidden[0, where]), positions[..., where]).float()
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = query.new_full((len(query), len(visual)), -float("inf"))
    logits[:, own] = (query @ key.transpose(-1, -2))[:, 0] * scoring.attention.scaling
    return logits


def without_hooks(module: nn.Module) -> nn.Module:
    """A second body for ``module`` around the same weights, whose runs no hook mistakes for those of the model.

    Parameters, buffers and configurations are shared, not copied.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        if hasattr(part, "config"):
            shared[id(part.config)] = part.config
    twin = copy.deepcopy(module, shared)
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin
