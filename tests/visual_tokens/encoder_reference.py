"""What the vision encoder of a LLaVA-like model computes, read from transformers' eager attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from reference import decoder_call, load, picture

import zoo
from zoo.models import LoadedModel

PROMPTS = ("<image>\nWhat is it?", "Look at this: <image> Is it on the left?", "<image>?")
SIZES = ((70, 50), (40, 110), (48, 48))


def inputs(loaded: LoadedModel, samples: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """One picture for each sample; the prompts are padded on the left."""
    texts = [PROMPTS[s] for s in samples]
    pictures = [picture(s, *SIZES[s]) for s in samples]
    return dict(loaded.processor(text=texts, images=pictures, return_tensors="pt", padding=True))


@dataclass
class Run:
    """One run of the encoder: ``maps[i]`` ``[B, H, 1 + N, 1 + N]``, ``states[i]`` ``[B, 1 + N, C]``."""

    maps: tuple[torch.Tensor, ...]
    states: tuple[torch.Tensor, ...]
    loaded: LoadedModel

    def projection(self, layer: int, name: str) -> torch.Tensor:
        """Output of ``q_proj``, ``k_proj`` or ``v_proj`` of a block (negative), not split, ``[B, 1 + N, C]``."""
        assert self.loaded.anatomy.encoder is not None
        block = self.loaded.anatomy.encoder.blocks[layer].module
        entered: torch.Tensor = getattr(block.self_attn, name)(block.layer_norm1(self.states[layer - 1]))
        return entered


@torch.no_grad()
def encode(name: str, pixels: torch.Tensor) -> Run:
    """Run the encoder of the tiny model ``name`` eagerly, with every map and state."""
    loaded = load(name)
    loaded.model.set_attn_implementation("eager")
    tower = loaded.model.model.vision_tower
    output = tower(pixels, output_attentions=True, output_hidden_states=True)
    return Run(output.attentions, output.hidden_states, loaded)


def numbers(loaded: LoadedModel, data: dict[str, Any], kept: list[torch.Tensor]) -> list[list[int]]:
    """Kept places as numbers among the visual tokens of each sample."""
    found = []
    for ids, places in zip(data["input_ids"], kept, strict=True):
        visual = (ids == loaded.model.config.image_token_id).nonzero().squeeze(-1)
        found.append((places - visual[0]).tolist())
    return found


@torch.no_grad()
def kept_by(loaded: LoadedModel, data: dict[str, Any], method: Any) -> list[list[int]]:
    """Numbers of the visual tokens that ``method`` keeps before the LLM, in the order of the shorter sequence."""
    with method.apply(loaded) as applied:
        applied(**data)
        return numbers(loaded, data, applied.kept[-1])


def all_kept(
    slug: str, name: str, samples: tuple[int, ...] = (0, 1, 2), **parameters: Any
) -> list[list[int]]:
    """``kept_by`` of a method, by name, on a fresh model."""
    loaded = load(name)
    return kept_by(loaded, inputs(loaded, samples), zoo.method(slug, **parameters))


@torch.no_grad()
def embeddings(loaded: LoadedModel, data: dict[str, Any], method: Any) -> list[torch.Tensor]:
    """What the decoder gets in the place of each sample's picture (one, without text inside), ``[K, D]``."""
    text = loaded.model.get_input_embeddings()
    found = []
    for sample, ids in enumerate(data["input_ids"]):
        one = {name: value[sample : sample + 1] for name, value in data.items()}
        with method.apply(loaded) as applied:
            call = decoder_call(applied.loaded, one)
        ids = ids[data["attention_mask"][sample].bool()]  # a shortened sequence has no padding of its own
        visual = (ids == loaded.model.config.image_token_id).nonzero().squeeze(-1)
        kept = call["inputs_embeds"].shape[1] - (len(ids) - len(visual))
        start = int(visual[0])
        assert torch.equal(call["inputs_embeds"][0, :start], text(ids[:start]))
        assert torch.equal(call["inputs_embeds"][0, start + kept :], text(ids[visual[-1] + 1 :]))
        found.append(call["inputs_embeds"][0, start : start + kept])
    return found


@torch.no_grad()
def check_two_pictures(slug: str, **parameters: Any) -> None:
    """Each of two pictures in one prompt becomes the tokens that it becomes alone, in its own place."""
    loaded, method = load("tiny-llava"), zoo.method(slug, **parameters)
    pictures = [picture(0), picture(1, 40, 110)]
    options = {"return_tensors": "pt"}
    together = dict(loaded.processor(text="<image> or <image>?", images=pictures, **options))
    alone = [
        embeddings(loaded, dict(loaded.processor(text="<image>", images=one, **options)), method)[0]
        for one in pictures
    ]
    with method.apply(loaded) as applied:
        got = decoder_call(applied.loaded, together)["inputs_embeds"][0]
    dense = decoder_call(loaded, together)["inputs_embeds"][0]
    first, second = (len(tokens) for tokens in alone)
    between = got.shape[0] - 2 - first - second  # <s>, the question mark, and the text between
    torch.testing.assert_close(got[1 : 1 + first], alone[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(got[1 + first : 1 + first + between], dense[37 : 37 + between])
    torch.testing.assert_close(got[1 + first + between :][:second], alone[1], rtol=1e-5, atol=1e-6)
