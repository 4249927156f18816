"""LatentMapper: initial noise from which the subjects of a prompt become visible, and apart from each other.

The noise is written as ``mu + exp(logvar / 2) * z`` and its mean and variance follow the gradient of two scores of the
U-Net's attention, while a bound on ``KL(N(mu, exp(logvar)) || N(0, 1))`` keeps it something a sampler can begin with.
Published details of OptiPrune being scarce, scores and constants are those of InitNO (arXiv 2404.04650).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch.nn import functional as F

from zoo.engines.denoising import AttentionMaps

CROSS, SELF = 0.2, 0.3
"""tau_c and tau_s: noise is valid when both scores lie below."""
MUTED_ABOVE = 0.5
"""While subjects are neglected so badly, only that is worked on."""
LEARNING_RATE, EPSILON = 1e-2, 1e-3
DRIFT = 1e-3
"""Largest KL divergence from the standard normal distribution, mean over the latents, in nats."""
_DRIFT_STEPS = 100
_SHARPEN = 100.0
_BLUR = 0.5
"""Standard deviation of the 3 x 3 Gaussian that smooths a subject's map, in tokens."""

Look = Callable[[torch.Tensor], AttentionMaps]
"""One pass of the U-Net on noise ``[1, C, h, w]``, with gradients."""


@dataclass(frozen=True)
class Found:
    """Noise with its scores.

    Attributes:
        noise: ``[1, C, h, w]``, detached.
        neglect: S_cross, in ``[0, 1]``: how little the most neglected subject is attended to.
        mixing: S_self, in ``[0, 1/2]``: how much the places of the subjects attend to the same.
    """

    noise: torch.Tensor
    neglect: float
    mixing: float

    @property
    def valid(self) -> bool:
        """Both scores are below their thresholds."""
        return self.neglect < CROSS and self.mixing < SELF


def scores(maps: AttentionMaps, subjects: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """S_cross and S_self of one prompt, as scalars with gradients.

    Args:
        maps: of one pass, batch 1.
        subjects: places of the subjects among the text tokens; 0 is the start token and none of them.
    """
    # The start token draws most of the attention and says nothing; the others compete without it.
    text = (maps.over_text[0, :, 1:] * _SHARPEN).softmax(-1)
    shown = _blurred(text[:, [place - 1 for place in subjects]].T.unflatten(-1, maps.grid)).flatten(1)
    neglect = 1 - shown.amax(-1).min()
    looks = maps.over_image[0, shown.argmax(-1)]
    shared = [
        torch.minimum(one, other).sum() / ((one + other).sum() + 1e-6)
        for one, other in combinations(looks, 2)
    ]
    return neglect, torch.stack(shared).mean() if shared else neglect.new_zeros(())


def _blurred(maps: torch.Tensor) -> torch.Tensor:
    """Maps ``[S, rows, columns]`` under a 3 x 3 Gaussian whose border mirrors."""
    line = torch.exp(-0.5 * (torch.tensor([-1.0, 0.0, 1.0], device=maps.device) / _BLUR) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(maps.unsqueeze(1), (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None]).squeeze(1)


def drift(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """``KL(N(mu, exp(logvar)) || N(0, 1))``, mean over all elements."""
    return (-0.5 * (1 + logvar - mu**2 - logvar.exp())).mean()


def optimise(look: Look, noise: torch.Tensor, subjects: list[int], steps: int) -> Found:
    """Work on one noise ``[1, C, h, w]`` until it is valid, at most ``steps`` times.

    The drift is brought back by an optimiser of its own, which follows the sum over the latents: Adam's step would
    shrink with their number otherwise, and its memory of the scores would push against it.
    """
    z = noise.float()
    with torch.enable_grad():
        mu, logvar = (torch.zeros_like(z, requires_grad=True) for _ in range(2))
        work, back = (torch.optim.Adam([mu, logvar], lr=LEARNING_RATE, eps=EPSILON) for _ in range(2))
        for step in range(steps + 1):
            mapped = mu + (0.5 * logvar).exp() * z
            neglect, mixing = scores(look(mapped.to(noise.dtype)), subjects)
            found = Found(mapped.detach().to(noise.dtype), neglect.item(), mixing.item())
            if found.valid or step == steps:
                break
            loss = neglect if found.neglect > MUTED_ABOVE else neglect + mixing
            _step(work, loss)
            for _ in range(_DRIFT_STEPS):
                if drift(mu, logvar) <= DRIFT:
                    break
                _step(back, drift(mu, logvar) * mu.numel())
    return found


def _step(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of the optimiser's own tensors; weights of the model get no gradient."""
    own = optimiser.param_groups[0]["params"]
    for tensor, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
        tensor.grad = gradient
    optimiser.step()


def map_noise(
    look: Look,
    noise: torch.Tensor,
    subjects: list[int],
    *,
    rounds: int,
    steps: int,
    last_steps: int,
    fresh: Callable[[], torch.Tensor],
) -> tuple[Found, int]:
    """Valid noise, or the most promising one after longer work on it.

    Args:
        look: gives the attention maps of a noise.
        noise: to begin with, ``[1, C, h, w]``.
        subjects: places of the subjects among the text tokens.
        rounds: noises that are tried.
        steps: of each.
        last_steps: on the best one when none became valid.
        fresh: draws another noise.

    Returns:
        What was found, and how many noises were tried.
    """
    tried: list[tuple[Found, torch.Tensor]] = []
    for _ in range(rounds):
        tried.append((optimise(look, noise, subjects, steps), noise))
        if tried[-1][0].valid:
            return tried[-1][0], len(tried)
        noise = fresh()
    _, start = min(tried, key=lambda one: one[0].neglect + one[0].mixing)
    return optimise(look, start, subjects, last_steps), len(tried)
