"""What a method did to a model: the figures that the panel, the HTML report and the catalogue show."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Bar(BaseModel):
    """What is left of one layer, block or stage."""

    model_config = ConfigDict(frozen=True)

    label: str
    kept: float
    total: float

    @property
    def ratio(self) -> float:
        """``kept / total``; 1 when there was nothing to remove."""
        return self.kept / self.total if self.total else 1.0


class DecodingStats(BaseModel):
    """Counters of one accelerated generation. ``accepted[i]`` tokens were committed by step ``i``."""

    steps: int = 0
    drafted: list[int] = Field(default_factory=list, description="Draft tokens verified, per step.")
    accepted: list[int] = Field(
        default_factory=list, description="Draft tokens accepted, per step (the bonus token not counted)."
    )
    committed: list[int] = Field(
        default_factory=list, description="Tokens committed, per step (bonus included)."
    )
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    prefill_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens committed per forward pass of the large model (its prefill not counted)."""
        return sum(self.committed) / self.steps if self.steps else 0.0

    @property
    def overhead_seconds(self) -> float:
        """Time that is neither drafting nor a forward pass of the large model."""
        return max(0.0, self.total_seconds - self.draft_seconds - self.verify_seconds - self.prefill_seconds)


class Report(BaseModel):
    """What one application removed.

    ``kept / total`` is the canonical budget of the family: parameters of the decoder for weight methods,
    visual tokens averaged over decoder layers for visual-token methods, tokens averaged over blocks for
    encoder methods.
    """

    method: str
    parameters: dict[str, object] = Field(default_factory=dict)
    unit: str
    kept: float
    total: float
    bars: dict[str, list[Bar]] = Field(
        default_factory=dict, description="Groups of bars: heads, channels, tokens ..."
    )
    facts: dict[str, float | int | str] = Field(
        default_factory=dict,
        description="Other figures, the paper's own budget among them, by readable name.",
    )
    decoding: DecodingStats | None = None

    @property
    def kept_ratio(self) -> float:
        """Fraction kept, in ``[0, 1]``."""
        return self.kept / self.total if self.total else 1.0

    @property
    def removed_ratio(self) -> float:
        """Fraction removed, in ``[0, 1]``."""
        return 1.0 - self.kept_ratio
