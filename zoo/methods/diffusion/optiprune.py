"""OptiPrune (arXiv 2507.00789): better initial noise for text-to-image diffusion, paid for by pruned self-attention.

SimPrune (``_simprune``) leaves tokens out of self-attention that are like others and copies what their likes got;
LatentMapper (``_latent_mapper``) looks for noise in which the subjects of the prompt show. No code of OptiPrune is
public: SimPrune is taken to be the operator of SiTo, LatentMapper that of InitNO (arXiv 2404.04650); see the card.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from pydantic import Field, PositiveInt

from zoo.engines.denoising import AttentionMaps, Grid, Reuse, watch_attention
from zoo.errors import BadInput
from zoo.families.diffusion_tokens import AppliedDiffusion, DiffusionTokenReducer
from zoo.interface import register
from zoo.methods.diffusion._latent_mapper import map_noise
from zoo.methods.diffusion._simprune import similarity_prune

MAP_DOWNSAMPLE = 4
"""Attention maps are read where a token covers 4 x 4 latents: 16 x 16 tokens for pictures of 512 pixels."""

_FUNCTION_WORD = re.compile(
    "a|an|the|and|or|of|on|in|at|by|to|from|with|without|for|as|is|are|was|be|it|its|this|that|these|those|"
    "one|two|three|some|his|her|their|my|your|very|next|near|under|over|behind|between"
)


def subject_tokens(tokenizer: Any, prompt: str, subjects: tuple[str, ...] | None) -> list[int]:
    """Where the subjects of a prompt stand among its tokens: the last token of each, in the order of the prompt.

    Args:
        tokenizer: a fast one, which knows where its tokens are from.
        prompt: the text.
        subjects: words of it; ``None`` = all but function words.

    Raises:
        BadInput: a subject is not in the prompt.
    """
    words = [(match.group().lower(), match.span()) for match in re.finditer(r"\w[\w'-]*", prompt)]
    missing = set(map(str.lower, subjects or ())) - {word for word, _ in words}
    if missing:
        raise BadInput(f"'{min(missing)}' is not a word of the prompt '{prompt}'; subjects are words of it")
    if subjects is None:
        wanted = [span for word, span in words if not _FUNCTION_WORD.fullmatch(word)]
    else:
        wanted = [span for word, span in words if word in map(str.lower, subjects)]
    encoded = tokenizer(
        prompt, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True
    )
    inside = [
        [place for place, (start, end) in enumerate(encoded.offset_mapping) if low <= start < end <= high]
        for low, high in wanted
    ]
    return [places[-1] for places in inside if places]  # a prompt may be cut off before its last words


@register("optiprune")
class OptiPrune(DiffusionTokenReducer):
    """Optimised noise and pruned self-attention."""

    prune_ratio: float = Field(0.5, ge=0, lt=1, description="Share of the tokens left out of self-attention.")
    patch: tuple[PositiveInt, PositiveInt] = Field(
        (2, 2), description="Rows and columns of the patches with one base token each."
    )
    beta: float = Field(1.0, ge=0, description="Weight of similarity in the choice of base tokens.")
    alpha: float = Field(0.1, ge=0, description="Weight of the random part of that choice.")
    subjects: tuple[str, ...] | None = Field(
        None, description="Words of the prompt that must show; none = all but function words."
    )
    rounds: int = Field(5, ge=0, description="Initial noises that are tried; 0 = the noise is left as it is.")
    steps: int = Field(10, ge=0, description="Optimisation steps of each.")
    last_steps: int = Field(50, ge=0, description="Steps on the best of them when none became valid.")

    def choose(self, tokens: torch.Tensor, grid: Grid, generator: torch.Generator) -> Reuse | None:
        """SimPrune. All samples share the noise: with classifier-free guidance both halves keep alike tokens."""
        if int(tokens.shape[1] * self.prune_ratio) == 0:
            return None
        noise = torch.randn(1, tokens.shape[1], generator=generator).to(tokens.device)
        return similarity_prune(
            tokens, grid, noise, self.prune_ratio, patch=self.patch, beta=self.beta, alpha=self.alpha
        )[1]

    def prepare(
        self, applied: AppliedDiffusion, prompts: Sequence[str], noise: torch.Tensor, steps: int, seed: int
    ) -> torch.Tensor:
        """LatentMapper, prompt by prompt, at the sampler's first step. A prompt without subjects keeps its noise."""
        if self.rounds == 0:
            return noise
        mapped = []
        for prompt, start in zip(prompts, noise.split(1), strict=True):
            places = subject_tokens(applied.loaded.tokenizer, prompt, self.subjects)
            if not places:
                mapped.append(start)
                continue
            applied.begin(seed)
            found, rounds = map_noise(
                _looking(applied, prompt, steps),
                start,
                places,
                rounds=self.rounds,
                steps=self.steps,
                last_steps=self.last_steps,
                fresh=_fresh(start, seed),
            )
            mapped.append(found.noise)
            applied.facts |= {
                "initial noises tried": rounds,
                "neglect of subjects": round(found.neglect, 4),
                "mixing of subjects": round(found.mixing, 4),
                "noise is valid": "yes" if found.valid else "no",
            }
        return torch.cat(mapped)


def _looking(applied: AppliedDiffusion, prompt: str, steps: int) -> Callable[[torch.Tensor], AttentionMaps]:
    """Attention maps of the sampler's first step for a noise ``[1, C, h, w]``; pruning stays on."""
    model, sampler = applied.model, applied.model.pipeline.scheduler
    text = model.encode([prompt])
    sampler.set_timesteps(steps, device=text.device)
    first = sampler.timesteps[0]

    def look(noise: torch.Tensor) -> AttentionMaps:
        grid = ceil(noise.shape[-2] / MAP_DOWNSAMPLE), ceil(noise.shape[-1] / MAP_DOWNSAMPLE)
        with watch_attention(applied.denoiser, grid) as maps:
            model(sampler.scale_model_input(noise * sampler.init_noise_sigma, first), first, text)
        return maps

    return look


def _fresh(like: torch.Tensor, seed: int) -> Callable[[], torch.Tensor]:
    """Draws other noise than ``seed`` gave, the same on every device."""
    generator = torch.Generator().manual_seed(seed + 1)
    return lambda: torch.randn(like.shape, generator=generator).to(like)
