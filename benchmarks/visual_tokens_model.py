"""The model and the sample of ``benchmarks/visual_tokens.py``: a LLaVA shape with random weights, one picture."""

from __future__ import annotations

import argparse

import torch

from zoo.models import LoadedModel

IMAGE_ID = 5
VOCABULARY = 4096
VISUAL = 576
BEFORE, AFTER = 35, 29
"""Text tokens in front of the picture and behind it, as in a LLaVA-1.5 prompt with a short question."""


def build(arguments: argparse.Namespace) -> LoadedModel:
    """A LLaVA-1.5-shaped model with lively random weights: matrices of standard deviation ``fan_in ** -0.5``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    width, seen = arguments.width, arguments.encoder_width
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=seen,
            intermediate_size=4 * seen,
            num_hidden_layers=arguments.encoder_layers,
            num_attention_heads=seen // 64,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=2048,
        ),
        image_token_id=IMAGE_ID,
        image_seq_length=VISUAL,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                inputs = 1 if "position_embedding" in name else parameter[0].numel()
                parameter.normal_(0, inputs**-0.5, generator=generator)
    return LoadedModel(model, ref="random LLaVA")


def picture_and_question() -> dict[str, torch.Tensor]:
    """One sample: ids and mask ``[1, L]``, pixels ``[1, 3, 336, 336]`` with smooth areas and noise."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(IMAGE_ID + 1, VOCABULARY, (BEFORE + AFTER,), generator=generator)
    ids = torch.cat((words[:BEFORE], torch.full((VISUAL,), IMAGE_ID), words[BEFORE:])).unsqueeze(0)
    coarse = torch.randn(1, 3, 12, 12, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(336, 336), mode="bicubic")
    pixels += 0.1 * torch.randn(pixels.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
