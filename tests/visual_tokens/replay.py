"""Decoding by hand what a method has decided: the sequence of every layer, its cache and its positions, by plain lists.

The method says which tokens stay, which are merged and where they stand (its reductions, as ``TokenReducer.watch``
sees them). Everything else is done here, one sample at a time and without padding: building the short sequences, with
deep-stacked features and positions of their own, caches of different lengths, what later steps read, and what is cut
from caches. Only the model's modules (norms, projections, rotary embedding, whole layers) are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from reference import decoder_call, visual_places
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zoo.engines.reductions import Join, Keep, Merge, Reduction, Replace, Transform
from zoo.engines.tokens import Stage, View
from zoo.models import LoadedModel


@dataclass
class Cut:
    """One decision about one sample.

    Attributes:
        stage: where it was taken.
        anchors: place in the padded prompt that each new token takes, in the method's order.
        groups: tokens that go into each, as numbers among the visual tokens then present, with their weights.
        values: new tokens that the method has made itself, ``[K, D]``.
    """

    stage: Stage
    anchors: list[int]
    groups: list[list[tuple[int, float]]]
    values: torch.Tensor | None = None

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """Visual tokens ``x [N, D]`` to new ones ``[K, D]``; a token on its own stays as it is."""
        if self.values is not None:
            return self.values.to(x.dtype)
        rows = [
            x[group[0][0]]
            if len(group) == 1 and group[0][1] == 1
            else sum((weight * x[number].float() for number, weight in group), torch.zeros(x.shape[1]))
            for group in self.groups
        ]
        return torch.stack([row.to(x.dtype) for row in rows]) if rows else x[:0]


def decided(stage: Stage, view: View, reduction: Reduction) -> Cut:
    """What a reduction says, token by token."""
    anchors = view.original[reduction.anchor[0]].tolist()
    groups: list[list[tuple[int, float]]] = [[] for _ in anchors]
    match reduction:
        case Keep():
            groups = [[(number, 1.0)] for number in reduction.index[0].tolist()]
        case Merge() | Join():
            weight = [1.0] * len(view.tokens) if reduction.weight is None else reduction.weight[0].tolist()
            for number, slot in enumerate(reduction.assignment[0].tolist()):
                if slot >= 0:
                    groups[slot].append((number, weight[number]))
            if reduction.normalise:
                totals = [sum(weight for _, weight in group) for group in groups]
                groups = [
                    [(number, weight / total) for number, weight in group]
                    for group, total in zip(groups, totals, strict=True)
                ]
        case Replace():
            return Cut(stage, anchors, groups, reduction.values[0].detach())
        case Transform():
            for slot, row in enumerate(reduction.matrix[0].tolist()):
                groups[slot] = [(number, weight) for number, weight in enumerate(row) if weight]
    return Cut(stage, anchors, groups)


class Sample:
    """One prompt on its way through the decoder."""

    def __init__(self, loaded: LoadedModel, data: Mapping[str, Any], padding: int) -> None:
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        self.decoder, self.inner, self.head = decoder, decoder.module, loaded.model.lm_head
        called = decoder_call(loaded, data)
        self.hidden = called["inputs_embeds"][0]
        self.length = len(self.hidden)
        places = visual_places(loaded, data["input_ids"][0])
        self.visual = [place in places for place in range(self.length)]
        self.place = [padding + place for place in range(self.length)]
        """Of each token, in the padded prompt."""
        self.weight = [1.0] * self.length
        positions = called.get("position_ids")
        self.grid = positions is not None and positions.dim() == 3
        self.positions = positions[-3:, 0] if self.grid else torch.arange(self.length)
        self.following = int(self.positions.max()) + 1
        self.deep = []
        for level in called.get("deepstack_visual_embeds") or []:
            self.deep.append(torch.zeros_like(self.hidden))
            self.deep[-1][places] = level
        self.cache = DynamicCache(config=decoder.config)
        self.shift = [0] * len(self.inner.layers)
        """How far new tokens move to the left, by layer."""
        self.weights: list[list[float]] = [[] for _ in self.inner.layers]
        """Of the cached keys, by layer."""
        self.seen: list[list[int]] = [[] for _ in self.inner.layers]
        """Places of the cached tokens, by layer."""
        self.hide: list[int] = []
        """Cached keys that deep layers do not read in this step."""

    def cut(self, cut: Cut, renumber: bool) -> None:
        own = [number for number, visual in enumerate(self.visual) if visual]
        of_place = {self.place[number]: number for number in own}
        order: list[
            tuple[int, int]
        ] = []  # token whose place it takes, and number of the new token (-1 = text)
        for visual, run in groupby(range(len(self.visual)), key=self.visual.__getitem__):
            block = list(run)
            if not visual:
                order += [(number, -1) for number in block]
                continue
            order += [(of_place[a], new) for new, a in enumerate(cut.anchors) if of_place[a] in block]

        def shorter(x: torch.Tensor) -> torch.Tensor:
            new = cut.mixed(x[own])
            return torch.stack([x[number] if slot < 0 else new[slot] for number, slot in order])

        self.hidden, self.deep = shorter(self.hidden), [shorter(level) for level in self.deep]
        if cut.stage.weigh:
            self.weight = [
                1.0 if slot < 0 else sum(self.weight[own[member]] for member, _ in cut.groups[slot])
                for _, slot in order
            ]
        else:
            self.weight = [self.weight[number] for number, _ in order]
        index = [number for number, _ in order]
        self.visual = [slot >= 0 for _, slot in order]
        self.place = [self.place[number] for number in index]
        self.positions = self.positions[..., index]
        if renumber and not self.grid:
            self.positions = torch.arange(len(index))
            first = max(cut.stage.layer, 0)
            self.shift[first:] = [self.length - len(index)] * (len(self.shift) - first)

    def layer(
        self, number: int, hidden: torch.Tensor, positions: torch.Tensor, weight: list[float]
    ) -> torch.Tensor:
        """Run one layer on ``[n, D]``; keys of weight ``w`` get ``log w``, hidden ones nothing."""
        block = self.inner.layers[number]
        self.weights[number] += weight
        keys, mask = len(self.weights[number]), None
        if max(self.weights[number]) > 1 or self.hide:
            mask = torch.full((len(hidden), keys), -1e30).triu(keys - len(hidden) + 1)
            mask = mask + torch.tensor(self.weights[number]).log()
            mask[:, self.hide] = -1e30
            mask = mask.to(hidden.dtype)[None, None]
        rotary = self.rotary(hidden, positions)
        given = {"position_embeddings": rotary, "past_key_values": self.cache, "use_cache": True}
        out: torch.Tensor = block(hidden.unsqueeze(0), attention_mask=mask, **given)[0]
        return out

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self.inner.rotary_emb(
            hidden.unsqueeze(0), position_ids=positions.unsqueeze(-2)
        )
        return found

    def read(self, cuts: list[Cut], policy: str) -> torch.Tensor:
        """The prompt; returns the logits of its last token."""
        by_layer = {max(cut.stage.layer, 0): cut for cut in cuts}
        for number in range(len(self.inner.layers)):
            if number in by_layer:
                cut = by_layer[number]
                self.cut(cut, (cut.stage.positions or policy) == "renumber")
            self.hidden = self.layer(number, self.hidden, self.positions, self.weight)
            if number < len(self.deep):
                self.hidden = self.hidden + self.deep[number]
            self.seen[number] = list(self.place)
        for cut in cuts:
            if cut.stage.trims is not None:
                for number in range(cut.stage.trims, cut.stage.layer):
                    self.trim(number, self.seen[cut.stage.layer])
        return self.logits(self.hidden)

    def trim(self, number: int, places: list[int]) -> None:
        index = [self.seen[number].index(place) for place in places]
        layer = self.cache.layers[number]
        layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
        self.seen[number] = list(places)
        self.weights[number] = [self.weights[number][place] for place in index]

    def step(self, token: int, number: int, reading: tuple[int, float] | None = None) -> torch.Tensor:
        """Token ``number`` after the prompt; returns its logits.

        ``reading``: layers from the first number on read only this share of the visual keys, by the attention of the
        layer before (the last two visual tokens are always read).
        """
        hidden = self.decoder.embed(torch.tensor([token]))
        self.hide = []
        for depth in range(len(self.inner.layers)):
            place = torch.tensor([self.following + number - self.shift[depth]])
            place = place.expand(3, 1) if self.grid else place
            before = hidden
            hidden = self.layer(depth, hidden, place, [1.0])
            if reading is not None and depth == reading[0] - 1:
                row = self.row(depth, before, place)
                candidates = [key for key, visual in enumerate(self.visual) if visual][:-2]
                candidates.sort(key=lambda key: -float(row[key]))
                self.hide = candidates[int(len(candidates) * reading[1]) :]
        return self.logits(hidden)

    def row(self, number: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Attention of the new token in a layer that has run, mean over heads, ``[K]``."""
        attention = self.inner.layers[number].self_attn
        normed = self.inner.layers[number].input_layernorm(hidden.unsqueeze(0))
        query = attention.q_proj(normed).view(1, 1, -1, attention.head_dim)
        query = attention.q_norm(query) if hasattr(attention, "q_norm") else query
        query, _ = apply_rotary_pos_emb(
            query.transpose(1, 2), query.transpose(1, 2), *self.rotary(hidden, positions)
        )
        keys = self.cache.layers[number].keys.repeat_interleave(attention.num_key_value_groups, dim=1)
        return (
            (query.float() @ keys.float().transpose(-1, -2) * attention.scaling).softmax(-1)[0, :, 0].mean(0)
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.inner.norm(hidden[-1:]))[0].float()
        return found

    @property
    def lengths(self) -> list[int]:
        """Keys in each layer's cache."""
        return [layer.get_seq_length() for layer in self.cache.layers]
