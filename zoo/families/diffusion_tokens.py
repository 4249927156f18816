"""Family base of methods that let the self-attention of a diffusion U-Net run on part of its image tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from zoo.engines.denoising import Grid, Reuse, SelfAttentionReuse
from zoo.errors import BadInput
from zoo.interface import Applied, Method, refuse
from zoo.models import LoadedModel
from zoo.models.diffusion import STEPS
from zoo.report import Bar, Report


class DiffusionTokenReducer(Method):
    """A method that says which tokens of a block run; see ``zoo.engines.denoising``."""

    phase = "diffusion"

    max_downsample: int = Field(
        1,
        ge=1,
        description="Coarsest blocks that are shortened, as latents per token along a side; 1 = the finest.",
    )

    @abstractmethod
    def choose(self, tokens: torch.Tensor, grid: Grid, generator: torch.Generator) -> Reuse | None:
        """What runs in the self-attention of one block; ``None`` = everything.

        Args:
            tokens: the block's input, before its norm: ``[B, N, C]``.
            grid: its rows and columns; ``N = rows * columns``, row by row.
            generator: of everything random, on the CPU; begins anew with each picture.
        """

    def prepare(
        self, applied: AppliedDiffusion, prompts: Sequence[str], noise: torch.Tensor, steps: int, seed: int
    ) -> torch.Tensor:
        """Initial noise to begin with, ``[B, C, h, w]``, in place of the random ``noise``; called with the hooks on."""
        return noise

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models that are no text-to-image U-Net."""
        anatomy = loaded.anatomy
        if anatomy.denoiser is None:
            raise refuse(self, "a text-to-image diffusion model", f"the architecture {anatomy.description}")

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedDiffusion:
        """Hook the U-Net of ``loaded``; every step that follows is cheaper, until ``close``.

        Raises:
            Refused: the model has no U-Net.
        """
        self.check(loaded)
        return AppliedDiffusion(self, loaded)


class AppliedDiffusion(Applied):
    """A method at work on a text-to-image model. ``generate`` takes what ``TextToImage.generate`` takes.

    Attributes:
        initial_noise: that the latest pictures began with, ``[B, C, h, w]``; ``None`` before the first.
        facts: figures for the report that the method noted while it prepared them.
    """

    def __init__(self, method: DiffusionTokenReducer, loaded: LoadedModel) -> None:
        self._generator = torch.Generator()
        self.begin(0)
        denoiser = loaded.anatomy.denoiser
        assert denoiser is not None
        self.denoiser = denoiser
        self._reuse = SelfAttentionReuse(
            denoiser,
            lambda tokens, grid: method.choose(tokens, grid, self._generator),
            method.max_downsample,
        )
        self._method = method
        self.initial_noise: torch.Tensor | None = None
        self.facts: dict[str, float | int | str] = {}
        super().__init__(method, loaded, self._reuse.close)

    def begin(self, seed: int) -> None:
        """Begin the random numbers of ``choose`` anew."""
        self._generator.manual_seed(seed)

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        steps: int = STEPS,
        seed: int = 0,
        size: int | None = None,
        noise: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Pictures ``[B, 3, H, W]`` in ``[0, 1]``; see ``TextToImage.generate``.

        Raises:
            BadInput: the method does not find in the prompt what it needs.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if noise is None:
            noise = self.model.noise(len(prompts), seed, size)
        self.begin(seed)
        self.facts = {}
        self.initial_noise = self._method.prepare(self, prompts, noise, steps, seed)
        self.begin(seed)
        pictures: torch.Tensor = self.model.generate(
            prompts, steps=steps, seed=seed, noise=self.initial_noise, **options
        )
        return pictures

    @property
    def report(self) -> Report:
        """Tokens in the self-attention of each block, of the latest denoising step.

        Raises:
            BadInput: nothing has run yet.
        """
        lengths = self._reuse.lengths
        if not lengths:
            raise BadInput(f"{self.method.name} has nothing to report: no picture has been made yet")
        return Report(
            method=self.method.name,
            parameters=self.method.parameters(),
            unit="tokens in self-attention (sum over blocks)",
            kept=sum(kept for kept, _ in lengths),
            total=sum(total for _, total in lengths),
            bars={
                "tokens in self-attention": [
                    Bar(label=str(block), kept=kept, total=total)
                    for block, (kept, total) in enumerate(lengths)
                ]
            },
            facts=self.facts,
        )
