"""Greedy decoding of a vision-language model with every layer, cache and position handled by hand.

One sample, no padding. It asks the model for what the language model is called with, and for its modules (norms,
projections, rotary embedding, layers); which tokens each layer sees, where they stand and what is cached is decided
here, by plain indexing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import VLMS
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zoo.engines.reductions import Merge
from zoo.engines.tokens import View
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

NEW = 6
ARCHITECTURES = VLMS
VIDEO = ("tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-internvl", "tiny-smolvlm")

Rule = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""``(visual hidden states, their places, attention row of the layer before)`` -> the places that are kept."""


def load(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    model, processor = tiny_model(name, seed=seed)
    model.generation_config.eos_token_id = None
    return LoadedModel(model.to(dtype), processor, name)


def picture(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def clip(seed: int, frames: int = 3) -> list[Image.Image]:
    return [picture(seed * 100 + frame, 48, 40) for frame in range(frames)]


def cast(data: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in data.items()}


def decoder_call(loaded: LoadedModel, data: Mapping[str, Any]) -> dict[str, Any]:
    """What the language model is called with on a whole prompt."""
    called: dict[str, Any] = {}

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        called.update(kwargs)

    decoder = loaded.anatomy.decoder
    assert decoder is not None
    hook = decoder.module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        loaded.model(**data, use_cache=False)
    finally:
        hook.remove()
    return called


def visual_places(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """Places of image and video tokens in ``ids [L]``."""
    config = loaded.model.config
    numbers = [config.image_token_id, getattr(config, "video_token_id", None)]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number in numbers:
        if number is not None:
            mask |= ids == number
    return mask.nonzero().squeeze(-1)


def last_row(layer: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Last row of a plain softmax attention of one decoder layer, ``[H, L]``."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    query, key = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query[:, :, -1:].float() @ key.float().transpose(-1, -2) * attention.scaling
    return scores.softmax(-1)[0, :, 0]


@torch.no_grad()
def greedy(
    loaded: LoadedModel, data: Mapping[str, Any], rule: Rule, layer: int, renumber: bool, new: int = NEW
) -> tuple[list[int], list[int]]:
    """Greedy tokens, and the length of each layer's cache after the prompt.

    Args:
        loaded: an SDPA model without hooks.
        data: inputs of one sample.
        rule: which visual tokens stay.
        layer: in front of which decoder layer; -1 before the LLM.
        renumber: count positions anew (never done to places in an image grid).
    """
    called = decoder_call(loaded, data)
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    inner, head = decoder.module, loaded.model.lm_head
    hidden = called["inputs_embeds"]
    length = hidden.shape[1]
    places = visual_places(loaded, data["input_ids"][0])
    positions = called.get("position_ids")
    grid = positions is not None and positions.dim() == 3
    if not grid:
        positions = torch.arange(length).unsqueeze(0)
    elif len(positions) == 4:
        positions = positions[1:]
    # The next token follows the largest position used, as if the prompt were whole.
    following = int(positions.max()) + 1
    deep = []
    for level in called.get("deepstack_visual_embeds") or []:
        full = torch.zeros_like(hidden)
        full[0, places] = level
        deep.append(full)
    cache = DynamicCache(config=decoder.config)
    shift = 0

    def cut(row: torch.Tensor | None) -> None:
        nonlocal hidden, positions, shift, deep
        kept = set(rule(hidden[0, places], places, row).tolist())
        gone = set(places.tolist()) - kept
        index = torch.tensor([place for place in range(length) if place not in gone])
        hidden = hidden[:, index]
        deep = [level[:, index] for level in deep]
        if renumber and not grid:
            positions = torch.arange(len(index)).unsqueeze(0)
            shift = len(gone)
        else:
            positions = positions[..., index]

    def step(block: Any, rotary: Any) -> None:
        nonlocal hidden
        hidden = block(
            hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache, use_cache=True
        )

    if layer == -1:
        cut(None)
    row = None
    for number, block in enumerate(inner.layers):
        if number == layer:
            cut(row)
        rotary = inner.rotary_emb(hidden, position_ids=positions)
        if number == layer - 1:
            row = last_row(block, hidden, rotary)
        step(block, rotary)
        if number < len(deep):
            hidden = hidden + deep[number]
    lengths = [entry.get_seq_length() for entry in cache.layers]
    tokens = [int(head(inner.norm(hidden[:, -1:])).argmax(-1))]
    for number in range(new - 1):
        hidden = decoder.embed(torch.tensor([[tokens[-1]]]))
        for depth, block in enumerate(inner.layers):
            place = torch.tensor([[following + number - (shift if depth >= layer else 0)]])
            step(block, inner.rotary_emb(hidden, position_ids=place.expand(3, 1, 1) if grid else place))
        tokens.append(int(head(inner.norm(hidden)).argmax(-1)))
    return tokens, lengths


def plain_divprune(ratio: float) -> Rule:
    """The algorithm as the paper states it: full distances, then min and argmax over slices."""

    def rule(visual: torch.Tensor, places: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
        keep = max(1, round(ratio * len(visual)))
        unit = visual.float() / visual.float().norm(dim=-1, keepdim=True)
        distances = 1 - unit @ unit.T
        chosen = [int(distances.topk(2, dim=0, largest=False).values[1].argmax())]
        while len(chosen) < keep:
            gap = distances[chosen].min(0).values
            gap[chosen] = -1
            chosen.append(int(gap.argmax()))
        return places[chosen]

    return rule


def plain_fastv(ratio: float) -> Rule:
    def rule(visual: torch.Tensor, places: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
        assert row is not None
        return places[row.mean(0)[places].topk(max(1, round(ratio * len(places)))).indices]

    return rule


CASES: dict[str, tuple[dict[str, Any], Rule, int, bool]] = {
    "divprune": ({"keep_ratio": 0.3}, plain_divprune(0.3), -1, True),
    "fastv": ({"keep_ratio": 0.4, "layer": 2}, plain_fastv(0.4), 2, False),
}
"""Slug -> parameters, rule, layer, whether positions are renumbered."""


def pairs(view: View) -> Merge:
    """Every two neighbours become one token, their mean, where the first one stood."""
    number = len(view.tokens)
    return Merge(
        torch.arange(number).unsqueeze(0) // 2,
        torch.ones(1, number),
        torch.arange(0, number, 2).unsqueeze(0),
    )
