"""The tiny vision-language models: their processors against transformers' own, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Idefics3Processor, LlavaNextProcessor

from zoo.errors import BadInput
from zoo.models.tiny import tiny_model

PROMPTS = ["<image>\nWhat is it?", "First <image>, then <image>."]
SIZES = [(70, 50), (31, 140), (48, 48)]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_llava_next_inputs_are_those_of_the_real_processor() -> None:
    _, ours = tiny_model("tiny-llava-next")
    theirs = LlavaNextProcessor(
        ours.image_processor,
        ours.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    same(
        ours(text=PROMPTS, images=pictures),
        dict(theirs(text=PROMPTS, images=pictures, return_tensors="pt", padding=True)),
    )


@pytest.mark.parametrize("name", ["tiny-idefics3", "tiny-smolvlm"])
def test_idefics_inputs_are_those_of_the_real_processor(name: str) -> None:
    _, ours = tiny_model(name)
    own = ours(text=PROMPTS, images=[picture(seed, size) for seed, size in enumerate(SIZES)])
    theirs = Idefics3Processor(ours.image_processor, ours.tokenizer, image_seq_len=9)
    nested = [[picture(0, SIZES[0])], [picture(1, SIZES[1]), picture(2, SIZES[2])]]
    same(own, dict(theirs(text=PROMPTS, images=nested, return_tensors="pt", padding=True)))


def test_prompts_and_pictures_that_do_not_belong_together() -> None:
    _, processor = tiny_model("tiny-internvl")
    with pytest.raises(BadInput, match="the prompts have 2 <image>, but 1 were given"):
        processor(text="<image> <image>", images=picture(0, (8, 8)))
    _, processor = tiny_model("tiny-idefics3")
    with pytest.raises(BadInput, match="idefics3 takes pictures, not videos"):
        processor(text="<video>", videos=[[picture(0, (8, 8))]])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 20)], ids=str)
@pytest.mark.parametrize("name", ["tiny-llava-next", "tiny-llava-onevision", "tiny-internvl", "tiny-smolvlm"])
def test_pictures_of_odd_sizes(name: str, size: tuple[int, int]) -> None:
    model, processor = tiny_model(name)
    with torch.no_grad():
        assert torch.isfinite(model(**processor(text="<image>?", images=picture(0, size))).logits).all()
