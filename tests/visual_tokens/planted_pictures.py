"""A vision-language model, and pictures, in which it is known what a method should find.

The model is ``tiny-llava`` with weights set by hand: patches reach the language model as they were written into the
pixels, and attention goes where two marks are. The vision encoder attends to patches that carry the mark ``SEEN``, the
question to tokens that carry the mark ``ASKED``. All other patches show an even wall. A few patches are planted:

- ``SEEN``: the planted patches carry the first mark; as many decoys carry the second.
- ``ASKED``: the other way round.
- ``BOTH``: they carry both, for methods that choose twice.
- ``DISTINCT``: they carry none. They only differ from the wall and from each other.
- ``CONTEXT``: two pictures with patches that are asked for, then one that shows little else.
- ``MOVING``: a film of the wall, in which two patches with both marks move on from frame to frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from zoo.engines.reductions import Join, Keep, Merge, Reduction
from zoo.engines.views import View
from zoo.families.visual_tokens import CACHED, AppliedTokens
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

Kind = Literal["seen", "asked", "both", "distinct", "context", "moving"]

PLACES, DECOYS = (3, 16, 21, 26, 35), (8, 11, 18, 28, 31)
SIDE, PATCH, WIDTH, FRAMES = 6, 8, 64, 8
TOKENS = SIDE * SIDE
DEPTH = 32
"""Decoder layers: most papers count theirs on a model of as many."""
SEEN, ASKED, TEXT, CLASS, WALL, OWN = 0, 1, 2, 3, 4, 8
"""Channels: two marks, all text, the class token, the wall; from the last on each planted patch has one of its own."""
QUESTION = "What is it?"


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def _pixels_of_channels() -> torch.Tensor:
    """Orthonormal patterns ``[WIDTH, 3 * PATCH * PATCH]``: what a patch shows for each channel."""
    return torch.linalg.qr(_random(3 * PATCH * PATCH, WIDTH, seed=0)).Q.T


@torch.no_grad()
def planted_model() -> LoadedModel:
    """The model; weights that nothing below speaks of are random and small."""
    model, processor = tiny_model("tiny-llava", num_hidden_layers=DEPTH)
    loaded = LoadedModel(model, processor, "tiny-llava")
    encoder, decoder, projector = (
        getattr(loaded.anatomy, name) for name in ("encoder", "decoder", "projector")
    )
    for module in encoder.module.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
    embeddings = encoder.module.embeddings
    embeddings.patch_embedding.weight.copy_(_pixels_of_channels().view(WIDTH, 3, PATCH, PATCH))
    embeddings.position_embedding.weight.zero_()
    embeddings.class_embedding.zero_()[[SEEN, CLASS]] = 1.0
    for block in encoder.blocks:
        query, key, output = (getattr(block.attention, name).linear for name in ("query", "key", "output"))
        query.weight.zero_()
        query.bias.fill_(1)
        key.bias.zero_()
        key.weight.mul_(0.1)[:, :OWN] = 0
        key.weight[:, SEEN] = 0.2
        for last in (output, block.mlp.fc2):
            last.weight.mul_(0.02)
            last.bias.zero_()
    # GELU leaves large numbers as they are: marked patches pass, the wall is bent a little.
    first, last = (module for module in projector.modules() if isinstance(module, nn.Linear))
    first.weight.copy_(torch.eye(WIDTH))[:, [SEEN, ASKED]] += 1
    first.bias.fill_(1)
    last.weight.copy_(torch.eye(WIDTH) - 1 / WIDTH)
    last.bias.zero_()
    words = decoder.embed.weight.mul_(0.3)
    words[:, :OWN] = 0
    words[:, TEXT], words[:, ASKED] = 3, 2
    for layer in decoder.layers:
        for norm in (layer.input_norm, layer.post_norm):
            norm.weight.fill_(1)
        attention = layer.attention
        # The slowest rotary channel hardly turns within a prompt; the one before it nearly so.
        slow = torch.arange(attention.heads) * attention.head_dim + attention.head_dim // 2 - 1
        query, key = attention.query.weight, attention.key.weight
        query[:, :OWN] *= 0.1
        query[slow.unsqueeze(1), torch.tensor([SEEN, ASKED, TEXT, WALL])] = 1.5
        key.mul_(0.6)[:, :OWN] *= 0.2
        key[slow[: attention.kv_heads], ASKED] = 1.5
        key[slow[: attention.kv_heads] - 1, WALL] = 1.5
        query.div_(20)
        key.mul_(20)
        attention.output.weight.mul_(0.05)
        layer.mlp.gate.weight.mul_(0.1)[:, ASKED] = 0.5
        layer.mlp.down.weight.mul_(0.3)
    return loaded


def picture(seen: Iterable[int], asked: Iterable[int], plain: Iterable[int] = ()) -> torch.Tensor:
    """Pixels ``[3, SIDE * PATCH, SIDE * PATCH]`` of a wall with patches that carry one mark, both, or none."""
    seen, asked = set(seen), set(asked)
    channels = 0.05 * _random(TOKENS, WIDTH, seed=1)
    for number, place in enumerate(sorted(seen | asked | set(plain))):
        channels[place, SEEN] += 1.2 * (place in seen)
        channels[place, ASKED] += 1.2 * (place in asked)
        channels[place, OWN + 5 * number % (WIDTH - OWN)] += 2
        channels[place, WALL] -= 2
    channels[:, WALL] += 2
    patches = (channels @ _pixels_of_channels()).view(SIDE, SIDE, 3, PATCH, PATCH)
    return patches.permute(2, 0, 3, 1, 4).reshape(3, SIDE * PATCH, SIDE * PATCH)


def pictures(kind: Kind) -> tuple[torch.Tensor, list[int]]:
    """Pixels ``[pictures, 3, H, W]``, and the planted tokens among all visual tokens of the prompt."""
    match kind:
        case "seen":
            return picture(PLACES, DECOYS).unsqueeze(0), list(PLACES)
        case "asked":
            return picture(DECOYS, PLACES).unsqueeze(0), list(PLACES)
        case "both":
            return picture(PLACES, PLACES).unsqueeze(0), list(PLACES)
        case "distinct":
            return picture((), (), PLACES).unsqueeze(0), list(PLACES)
        case "context":
            example = picture(DECOYS, PLACES)
            shown = [example, example, picture((), range(TOKENS - 8))]
            return torch.stack(shown), [TOKENS * number + place for number in (0, 1) for place in PLACES]
        case "moving":
            places = [[(7 * frame + step) % TOKENS for step in (3, 4)] for frame in range(FRAMES)]
            frames = [picture(own, own) for own in places]
            return torch.stack(frames), [TOKENS * n + place for n, own in enumerate(places) for place in own]


def prompt(loaded: LoadedModel, kind: Kind) -> tuple[dict[str, Any], list[int]]:
    """Inputs of one sample, and its planted tokens."""
    pixels, planted = pictures(kind)
    between = "\nthis\n" if kind == "context" else ""
    text = between.join(["<image>"] * len(pixels)).replace("<image>", "<image>" * TOKENS) + f"\n{QUESTION}"
    ids = loaded.tokenizer(text, return_tensors="pt")
    return {
        "input_ids": ids["input_ids"],
        "attention_mask": ids["attention_mask"],
        "pixel_values": pixels,
    }, planted


class Watched:
    """What a method does to one prompt, stage by stage.

    Attributes:
        total: visual tokens of the prompt.
        places: number of each visual token behind each stage, in the order of the sequence.
        lengths: visual tokens that each decoder layer has in its cache.
        reported: the same, as the report says it.
    """

    def __init__(self, applied: AppliedTokens, inputs: dict[str, Any]) -> None:
        self._made_of: torch.Tensor | None = None
        applied.reducer.watch = self._note
        with torch.no_grad():
            cache = applied(**inputs, use_cache=True).past_key_values
        applied.reducer.watch = None
        visual = inputs["input_ids"][0] == applied.loaded.anatomy.image_token_id
        number = visual.cumsum(0) - 1
        self.total = int(visual.sum())
        self.places = [number[rows[0]].tolist() for rows in applied.kept.values()]
        self.lengths = [layer.get_seq_length() - int((~visual).sum()) for layer in cache.layers]
        bars = applied.report.bars
        self.reported = [round(bar.kept) for bar in bars.get(CACHED) or bars["visual tokens"]]

    def _note(self, view: View, reduction: Reduction) -> None:
        arriving = self._made_of
        if arriving is None or len(arriving) != len(view.tokens):  # the first stage, or tokens came back
            arriving = torch.eye(view.total)[view.ordinal]
        self._made_of = parts_of(reduction, len(view.tokens)) @ arriving

    def found(self, planted: list[int]) -> tuple[float, float]:
        """How many of the planted tokens go on, of as many as could; and what the inverse choice would have got.

        A token goes on when it is in one that is made of planted ones by half or more. The inverse choice takes as
        many tokens among those that do not go on, and is given the best of them.
        """
        assert self._made_of is not None
        weight = self._made_of.sum(1).clamp(min=1e-9)
        clear = self._made_of[:, planted].sum(1) / weight >= 0.5
        survivors = int((self._made_of[clear][:, planted] > 0).any(0).sum())
        most = min(len(self._made_of), len(planted))
        return min(1.0, survivors / most), min(1.0, (len(planted) - survivors) / most)


def parts_of(reduction: Reduction, tokens: int) -> torch.Tensor:
    """How much of each of ``tokens`` tokens goes into each new one, ``[K, tokens]``."""
    if isinstance(reduction, Keep):
        return torch.eye(tokens)[reduction.index[0]]
    if isinstance(reduction, Merge | Join):
        into = reduction.assignment[0]
        return (into.unsqueeze(0) == torch.arange(reduction.length).unsqueeze(1)).float()
    return reduction.matrix[0].float()
