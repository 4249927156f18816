"""What a run leaves behind: figures with units, and everything needed to judge and repeat them.

One ``RunRecord`` is the single source of the panel, the HTML report, ``--json`` and the catalogue's rows, so these
can never show different numbers. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from zoo.report import Report

PROTOCOL = "1"
"""Version of the measuring protocol; raised whenever figures would no longer be comparable."""

Status = Literal["done", "interrupted", "failed"]
Arm = Literal["dense", "method", "ratio"]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("a measurement must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
"""A number that JSON and a database can hold."""


class Quantity(BaseModel):
    """One thing that is measured.

    ``better`` says which direction is an improvement, hence whether a gain is ``dense / method`` (``lower``) or
    ``method / dense`` (``higher``); ``None`` for figures that are neither good nor bad.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    label: str
    unit: str
    better: Literal["lower", "higher"] | None
    group: Literal["speed", "quality", "memory"]
    definition: str


def _quantities(*rows: tuple[str, str, str, str | None, str, str]) -> dict[str, Quantity]:
    names = ("id", "label", "unit", "better", "group", "definition")
    return {row[0]: Quantity.model_validate(dict(zip(names, row, strict=True))) for row in rows}


QUANTITIES = _quantities(
    # Speed
    (
        "prefill-time", "prefill", "ms", "lower", "speed",
        "One forward pass over the whole prompt, filling the cache.",
    ),
    (
        "decode-speed", "decode", "tokens/s", "higher", "speed",
        "Tokens per second after the first one, batch 1, greedy.",
    ),
    (
        "generation-speed", "whole generation", "tokens/s", "higher", "speed",
        "New tokens over total time, prefill included.",
    ),
    (
        "selection-time", "of which selection", "ms", "lower", "speed",
        "Part of the prefill spent choosing what to keep: timed beside a replay of the same choice.",
    ),
    (
        "image-time", "time per image", "ms", "lower", "speed",
        "One forward pass of the encoder over the batch, per image.",
    ),
    (
        "text-time", "time per text", "ms", "lower", "speed",
        "One forward pass of the text encoder over the batch, per text.",
    ),
    (
        "step-time", "denoising step", "ms", "lower", "speed",
        "One pass of the U-Net over the latents of one picture, with and without the prompt.",
    ),
    (
        "picture-time", "whole picture", "s", "lower", "speed",
        "From the prompt to the picture; work on the initial noise is part of it.",
    ),
    (
        "flops", "FLOPs", "GFLOP", "lower", "speed",
        "Floating-point operations of the timed forward pass, counted while it runs.",
    ),
    (
        "tokens-per-step", "tokens per forward pass", "", "higher", "speed",
        "Tokens committed per pass of the large model.",
    ),
    # Quality
    (
        "perplexity", "perplexity", "", "lower", "quality",
        "Exponential of the mean next-token loss on held-out text.",
    ),
    (
        "agreement", "next-token agreement", "", "higher", "quality",
        "Fraction of positions whose most likely next token is the dense model's.",
    ),
    (
        "kl", "KL from dense", "nats", "lower", "quality",
        "Mean Kullback-Leibler divergence KL(dense || method) of next-token distributions.",
    ),
    (
        "identical-tokens", "identical tokens", "", "higher", "quality",
        "Fraction of the generated tokens before the first difference from the dense model's.",
    ),
    (
        "first-token-agreement", "first-token agreement", "", "higher", "quality",
        "1 when the first generated token is the dense model's.",
    ),
    (
        "cosine-cls", "cosine of [CLS] features", "", "higher", "quality",
        "Cosine similarity of the final class token with the dense model's.",
    ),
    (
        "cosine-mean", "cosine of mean patch features", "", "higher", "quality",
        "Cosine similarity of the mean patch (weighted by size where tokens were merged) with the dense model's.",
    ),
    (
        "cosine-noise", "cosine of predicted noise", "", "higher", "quality",
        "Cosine similarity of the noise predicted in one denoising step with the dense model's.",
    ),
    (
        "cosine-text", "cosine of text embeddings", "", "higher", "quality",
        "Cosine similarity of the embeddings of held-out passages with the dense model's.",
    ),
    (
        "retrieval", "passages found", "", "higher", "quality",
        "Fraction of held-out passages whose own continuation is nearest among all continuations.",
    ),
    (
        "accuracy", "accuracy", "", "higher", "quality",
        "Fraction of questions answered right.",
    ),
    (
        "loyalty", "loyalty", "", "higher", "quality",
        "Fraction of questions answered as the dense model answers them, right or wrong.",
    ),
    (
        "benchmark-score", "score", "", "higher", "quality",
        "A benchmark's own score where that is not the fraction of questions answered right, or the mean score of "
        "several benchmarks; 1 = all points.",
    ),
    (
        "retained-score", "retained", "", "higher", "quality",
        "Score over the dense model's score, mean over the benchmarks of a suite.",
    ),
    (
        "retained-score-rms", "retained, root mean square", "", "higher", "quality",
        "Root mean square of these ratios: EffiVLM-Bench's overall performance.",
    ),
    (
        "unevenness", "unevenness over benchmarks", "%", "lower", "quality",
        "Standard deviation of these ratios over their mean: EffiVLM-Bench's generalisation.",
    ),
    # Memory
    ("parameters", "parameters", "M", "lower", "memory", "All parameters of the model, shared ones once."),
    ("weight-bytes", "weights", "MB", "lower", "memory", "Bytes of all parameters, shared ones once."),
    (
        "kv-bytes", "KV cache", "MB", "lower", "memory",
        "Bytes of keys and values after the prefill, measured in the cache.",
    ),
    (
        "peak-memory", "peak memory of the prefill", "MB", "lower", "memory",
        "Most GPU memory allocated during the timed forward pass.",
    ),
)  # fmt: skip
"""The closed list of measured quantities, by id."""


class Figure(BaseModel):
    """A measured value: median of ``n`` samples.

    ``spread`` is half the distance between the quartiles (absent for exact counts), in the same unit. ``wall`` is
    the median on the wall clock where the figure itself is processor time. ``items`` has a character per question
    where questions were asked, in their order: 1 for right, 0 for wrong.
    """

    model_config = ConfigDict(frozen=True)

    median: Finite
    spread: Finite | None = None
    n: int = Field(1, ge=1)
    wall: Finite | None = None
    items: str | None = Field(None, pattern="^[01]*$")


class Comparison(BaseModel):
    """One quantity, dense beside method.

    Attributes:
        task: data and protocol of the figure (``news, 16 x 256 tokens``).
        gain: how many times better the method is (ratio of medians; 1 = no change).
        bound: the largest gain that the saved work allows; absent where no such limit is stated.
        bound_of: in words, what the bound is computed from.
        suspect: the gain lies above its bound by more than the noise: an error of measurement, or an effect (caches)
            that the bound does not model.
    """

    model_config = ConfigDict(frozen=True)

    quantity: str
    task: str = ""
    dense: Figure | None = None
    method: Figure | None = None
    gain: Finite | None = None
    bound: Finite | None = None
    bound_of: str | None = None
    suspect: bool = False

    @property
    def about(self) -> Quantity:
        """Label, unit and direction of the quantity."""
        return QUANTITIES[self.quantity]

    @property
    def efficiency(self) -> float | None:
        """Realised gain over the bound."""
        return self.gain / self.bound if self.gain is not None and self.bound else None


def compare(
    quantity: str,
    dense: Figure | None,
    method: Figure | None,
    *,
    task: str = "",
    bound: float | None = None,
    bound_of: str | None = None,
) -> Comparison:
    """Set two figures side by side: the gain in the quantity's good direction, and whether it can be true.

    A gain is suspect when even its low end (dense and method each moved by their spread) lies 2% above the bound.
    """
    about = QUANTITIES[quantity]
    gain, low = None, None
    if dense is not None and method is not None and about.better is not None:
        worse, better = (dense, method) if about.better == "lower" else (method, dense)
        gain = _ratio(worse.median, better.median)
        low = _ratio(worse.median - (worse.spread or 0.0), better.median + (better.spread or 0.0))
    suspect = bound is not None and low is not None and low > 1.02 * bound
    return Comparison(
        quantity=quantity, task=task, dense=dense, method=method, gain=gain, bound=bound, bound_of=bound_of,
        suspect=suspect,
    )  # fmt: skip


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 and math.isfinite(a / b) else None


class Piece(BaseModel):
    """A stretch of generated text; ``accepted`` when it came from an accepted draft."""

    model_config = ConfigDict(frozen=True)

    text: str
    accepted: bool = False


class Outputs(BaseModel):
    """What both models wrote for the same prompt, decoded greedily.

    ``common`` counts the leading tokens that are equal; ``common_text`` is their length in characters in both texts.
    """

    prompt: str
    dense: str
    method: str
    tokens_dense: int
    tokens_method: int
    common: int
    common_text: int
    identical: bool
    gap: Finite | None = Field(
        None,
        description="Dense logit gap between its two best tokens at the first difference: small = a tie.",
    )
    pieces: list[Piece] = Field(default_factory=list, description="The method's text, draft by draft.")
    meaningless: bool = Field(False, description="The model's weights are random, so the words are noise.")


class ModelFacts(BaseModel):
    """Which model was measured."""

    ref: str
    revision: str | None = None
    architecture: str
    facts: dict[str, Any] = Field(default_factory=dict)


class RunRecord(BaseModel):
    """Everything one run found out, and what it needs to be repeated."""

    key: str = Field(description="Unique everywhere.")
    protocol: str = PROTOCOL
    method: str
    parameters: dict[str, Any]
    model: ModelFacts
    status: Status = "done"
    error: str | None = None
    started: str = Field(description="UTC, ISO 8601.")
    seconds: float = 0.0
    device: str
    dtype: str
    seed: int
    inputs: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    reports: list[Report] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    bars: dict[str, list[tuple[float, float]]] = Field(
        default_factory=dict, description="Measured per layer: (method, dense), e.g. KV bytes."
    )
    outputs: Outputs | None = None
    notes: list[str] = Field(default_factory=list)
    saved: str | None = Field(None, description="Folder of the pruned model.")
    command: str = Field("", description="Command line that repeats the run.")

    def measurements(self) -> Iterator[dict[str, Any]]:
        """Flat rows, one per quantity and arm, as the catalogue keeps them.

        Gains and bounds are rows of the arm ``ratio``; a bound's quantity has the suffix ``-bound``.
        """
        for row in self.comparisons:
            unit = row.about.unit or "1"
            for arm, figure in (("dense", row.dense), ("method", row.method)):
                if figure is not None:
                    yield _row(row, row.quantity, arm, unit, figure)
            if row.gain is not None:
                yield _row(row, row.quantity, "ratio", "times", Figure(median=row.gain))
            if row.bound is not None:
                yield _row(row, f"{row.quantity}-bound", "ratio", "times", Figure(median=row.bound))

    def to_json(self) -> str:
        """The record as JSON, with the flat measurements beside the comparisons."""
        import json

        body = self.model_dump(mode="json")
        body["measurements"] = list(self.measurements())
        return json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False)


def _row(row: Comparison, quantity: str, arm: str, unit: str, figure: Figure) -> dict[str, Any]:
    return {
        "task": row.task,
        "quantity": quantity,
        "arm": arm,
        "unit": unit,
        "median": figure.median,
        "spread": figure.spread,
        "n": figure.n,
    }
