"""How much to measure. Apart from the rest so that the command line can build it without loading torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        repeats: timed rounds per quantity.
        seconds: start no further round of one quantity after this much time (three are always made).
        new_tokens: tokens to generate; ``None`` = what the scenario finds sensible.
        windows, window: held-out text for perplexity: windows, and tokens per window.
        prompt: tokens of the timed prefill of text models.
    """

    repeats: int = 5
    seconds: float = 20.0
    new_tokens: int | None = None
    windows: int = 16
    window: int = 256
    prompt: int = 128
