"""Text-to-image diffusion: a ``diffusers`` pipeline as one module, and where the parts of its U-Net are.

``diffusers`` is an optional package (``pip install 'efficiency-zoo[diffusion]'``), imported only when such a model is
built or loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from zoo.errors import BadInput, NeedsExtra
from zoo.models.anatomy import (
    Anatomy,
    Attention,
    Denoiser,
    DenoiserBlock,
    LinearPart,
    architecture,
)

MODEL_TYPE = "stable-diffusion"
STEPS = 50
GUIDANCE = 7.5
INDEX = "model_index.json"
"""The file by which a folder with a pipeline is recognised."""
_PIPELINE = "StableDiffusionPipeline"
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}
_UNUSED: dict[str, None] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


class TextToImage(nn.Module):
    """A latent diffusion pipeline: text encoder, U-Net, decoder and sampler.

    Calling it is one denoising step, ``generate`` the whole way from a prompt to a picture.
    """

    main_input_name = "prompt"

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.unet: nn.Module = pipeline.unet
        self.text_encoder: Any = pipeline.text_encoder
        self.vae: nn.Module = pipeline.vae
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def config(self) -> Any:
        """What the rest of the zoo asks a model's configuration for."""
        attention = self.text_encoder.config._attn_implementation
        return SimpleNamespace(
            model_type=MODEL_TYPE, _attn_implementation=attention, unet=self.pipeline.unet.config
        )

    def set_attn_implementation(self, name: str) -> None:
        """The text encoder's attention; the U-Net runs torch's fused attention whatever is set."""
        self.text_encoder.set_attn_implementation(name)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Predicted noise ``[B, C, h, w]`` for latents of that shape and encoded prompts ``[B, T, D]``."""
        predicted: torch.Tensor = self.unet(
            sample, timestep, encoder_hidden_states=encoder_hidden_states
        ).sample
        return predicted

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts as the U-Net reads them, padded to the encoder's length: ``[B, T, D]``."""
        device = next(self.parameters()).device
        with torch.no_grad():
            encoded: torch.Tensor = self.pipeline.encode_prompt(list(prompts), device, 1, False)[0]
        return encoded

    def noise(self, prompts: int, seed: int = 0, size: int | None = None) -> torch.Tensor:
        """Initial noise ``[prompts, C, h, w]`` from N(0, 1), drawn on the CPU: the same on every device.

        All prompts of a batch begin with the same noise, so a batch gives the pictures of its prompts one by one.

        Args:
            prompts: how many.
            seed: of the noise.
            size: height and width of the picture in pixels; ``None`` = what the model was trained for.

        Raises:
            BadInput: the size is no multiple of the pixels per latent.
        """
        scale, config = self.pipeline.vae_scale_factor, self.pipeline.unet.config
        side = config.sample_size if size is None else size // scale
        if size is not None and (size < scale or size % scale):
            raise BadInput(
                f"the size of a picture is a multiple of {scale} pixels for this model, not {size}"
            )
        generator = torch.Generator().manual_seed(seed)
        one = torch.randn(1, config.in_channels, side, side, generator=generator)
        weight = next(self.parameters())
        return one.to(weight.device, weight.dtype).expand(prompts, -1, -1, -1)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        seed: int = 0,
        size: int | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pictures ``[B, 3, H, W]`` in ``[0, 1]``, float32.

        Args:
            prompt: one, or a batch of them.
            steps: of the sampler.
            guidance: weight of classifier-free guidance; up to 1 = none.
            seed: of the initial noise and of the sampler's own.
            size: as in ``noise``.
            noise: initial noise, in place of ``seed`` and ``size``.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if noise is None:
            noise = self.noise(len(prompts), seed, size)
        scale = self.pipeline.vae_scale_factor
        made = self.pipeline(
            prompt=prompts,
            height=noise.shape[-2] * scale,
            width=noise.shape[-1] * scale,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for _ in prompts],
            latents=noise,
            output_type="pt",
        ).images
        pictures: torch.Tensor = made.float()
        return pictures


def diffusers() -> Any:
    """The package.

    Raises:
        NeedsExtra: it is not installed.
    """
    try:
        import diffusers as package
    except ImportError:
        raise NeedsExtra(
            "text-to-image models need diffusers; install it with: pip install 'efficiency-zoo[diffusion]'"
        ) from None
    return package


def load_text_to_image(folder: Path, dtype: torch.dtype | None) -> tuple[TextToImage, Any]:
    """A Stable Diffusion pipeline that ``save_pretrained`` wrote, and its tokenizer.

    Only safetensors are read, and only classes of ``diffusers`` and ``transformers`` are made. The safety checker is
    left out: the zoo compares pictures, it does not publish them.

    Raises:
        BadInput: another pipeline, foreign classes, or weights that are missing or damaged.
        NeedsExtra: ``diffusers`` is not installed.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        kind = index.get("_class_name")
        libraries = {value[0] for value in index.values() if isinstance(value, list) and value[0]}
    except (ValueError, OSError, AttributeError, IndexError) as error:
        raise BadInput(f"{folder / INDEX} cannot be read: {error}") from None
    if kind != _PIPELINE:
        raise BadInput(f"{folder} holds a {kind}; the zoo reads pipelines of the class {_PIPELINE}")
    if not libraries <= _LIBRARIES:
        raise BadInput(
            f"{folder} names classes of {', '.join(sorted(libraries - _LIBRARIES))}, which are not run"
        )
    try:
        pipeline = getattr(diffusers(), _PIPELINE).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **_UNUSED
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the pipeline in {folder} cannot be loaded: {reason}") from None
    return TextToImage(pipeline), pipeline.tokenizer


# --- anatomy --------------------------------------------------------------------------------------------------


@architecture(MODEL_TYPE)
def stable_diffusion(model: Any) -> Anatomy:
    """Anatomy of a ``TextToImage``."""
    blocks = tuple(_block(block) for block in _transformer_blocks(model.unet))
    return Anatomy("diffusion", MODEL_TYPE, denoiser=Denoiser(model.unet, blocks))


def _transformer_blocks(unet: Any) -> Iterator[Any]:
    """In the order in which they run: on the way down, at the bottom, on the way up."""
    for stage in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for transformer in getattr(stage, "attentions", ()):
            yield from transformer.transformer_blocks


def _block(block: Any) -> DenoiserBlock:
    cross = None if block.attn2 is None else _attention(block.attn2)
    return DenoiserBlock(block, _attention(block.attn1), cross, block.ff)


def _attention(module: Any) -> Attention:
    return Attention(
        module=module,
        query=LinearPart(module, "to_q"),
        key=LinearPart(module, "to_k"),
        value=LinearPart(module, "to_v"),
        output=LinearPart(module.to_out, "0"),
        head_dim=module.inner_dim // module.heads,
        scaling=module.scale,
    )


# --- a tiny one -----------------------------------------------------------------------------------------------


def tiny_text_to_image(tokenizer: Any, vocabulary: int, changes: dict[str, Any]) -> TextToImage:
    """A U-Net on 32 x 32 latents with attention at 32, 16 and 8 tokens a side; ``changes`` are fields of the U-Net.

    Raises:
        NeedsExtra: ``diffusers`` is not installed.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    package = diffusers()
    unet: dict[str, Any] = {
        "sample_size": 32,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,  # the number of heads, in spite of its name
        "norm_num_groups": 8,
    }
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = package.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    pipeline = package.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=package.UNet2DConditionModel(**{**unet, **changes}),
        scheduler=package.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
        requires_safety_checker=False,
        **_UNUSED,
    )
    return TextToImage(pipeline)
