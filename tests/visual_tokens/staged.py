"""One forward pass of a vision-language model, layer by layer, with tokens leaving in front of several layers.

Like ``reference.greedy``, for methods with more than one stage: one sample, no padding, no cache, and attention as full
maps. Between layers a rule gets everything and returns the new sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from reference import decoder_call, picture, visual_places
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zoo.models import LoadedModel

PROMPTS = ("<image>\nWhat is it?", "Look at this: <image> Is it on the left?", "<image>?")


def inputs(loaded: LoadedModel, *samples: int) -> dict[str, Any]:
    texts, pictures = [PROMPTS[s] for s in samples], [picture(s) for s in samples]
    return dict(loaded.processor(text=texts, images=pictures, return_tensors="pt", padding=True))


@dataclass
class Sequence:
    """What stands in front of a layer.

    Attributes:
        hidden: ``[L, D]``.
        visual: places of the visual tokens among them.
        positions: ``[L]``.
        before: attention map of the layer before, ``[H, L, L]``.
        coming: attention map of the layer that comes.
        embeddings: what entered the decoder, ``[L0, D]``.
    """

    hidden: torch.Tensor
    visual: list[int]
    positions: torch.Tensor
    before: torch.Tensor
    coming: Callable[[], torch.Tensor]
    embeddings: torch.Tensor

    def cut(self, kept: list[int], renumber: bool) -> None:
        """Keep the visual tokens at places ``kept`` (ascending)."""
        stay = [place for place in range(len(self.hidden)) if place not in self.visual or place in kept]
        self.hidden = self.hidden[stay]
        self.positions = torch.arange(len(stay)) if renumber else self.positions[stay]
        self.visual = [new for new, place in enumerate(stay) if place in kept]


Rule = Callable[[Sequence], None]
"""Changes the sequence in place."""


def attention_map(
    block: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Plain causal softmax attention of one layer, ``[H, L, L]``."""
    attention = block.self_attn
    normed = block.input_layernorm(hidden.unsqueeze(0))
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    query, key = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query.float() @ key.float().transpose(-1, -2) * attention.scaling)[0]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


@torch.no_grad()
def logits_by_hand(
    loaded: LoadedModel, data: Mapping[str, Any], rules: Mapping[int, Rule]
) -> tuple[torch.Tensor, dict[int, int]]:
    """Logits of the last token ``[V]``, and the visual tokens behind each rule."""
    embeddings = decoder_call(loaded, data)["inputs_embeds"][0]
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    inner = decoder.module
    now = Sequence(
        embeddings,
        visual_places(loaded, data["input_ids"][0]).tolist(),
        torch.arange(len(embeddings)),
        torch.empty(0),
        lambda: torch.empty(0),
        embeddings,
    )
    left = {}
    for number, block in enumerate(inner.layers):
        if number in rules:
            here = inner.rotary_emb(now.hidden.unsqueeze(0), position_ids=now.positions.unsqueeze(0))
            now.coming = lambda block=block, here=here: attention_map(block, now.hidden, here)
            rules[number](now)
            left[number] = len(now.visual)
        rotary = inner.rotary_emb(now.hidden.unsqueeze(0), position_ids=now.positions.unsqueeze(0))
        now.before = attention_map(block, now.hidden, rotary)
        now.hidden = block(now.hidden.unsqueeze(0), attention_mask=None, position_embeddings=rotary)[0]
    return loaded.model.lm_head(inner.norm(now.hidden[-1])), left


def best(scores: torch.Tensor, count: int) -> list[int]:
    """Numbers of the largest scores, ascending, by sorting."""
    order = sorted(range(len(scores)), key=lambda number: -float(scores[number]))
    return sorted(order[:count])
