"""The figures of a method at one budget in ``benchmarks/visual_tokens.py``, the aims, and a line of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visual_tokens_arms import Run

from zoo.bench.record import Figure
from zoo.bench.timing import summarise

BY_HAND = "(shorter prompt)"
"""The row that says which part of the bound this machine reaches at all: a dense run on a prompt so much shorter."""
EFFICIENCY = {"before": 0.85, "inside": 0.8}
SHARE = 0.05
HEAD = (
    f"{'method':22}{'where':>8}{'keep':>6}{'kept':>7}{'LLM ms':>9}{'gain':>14}{'bound':>7}{'eff':>6}"
    f"{'whole':>7}{'bound':>7}{'sel. ms':>9}{'share':>7}  misses"
)


@dataclass
class Row:
    """What one method did at one budget. Times in milliseconds; ``flops`` in 10^9 (whole, and before the LLM)."""

    method: str
    keep_ratio: float | None
    place: str = ""
    kept: float | None = None
    skipped: str | None = None
    flops: tuple[float, float] | None = None
    gain: Figure | None = None
    bound: float | None = None
    whole_gain: Figure | None = None
    whole_bound: float | None = None
    dense_ms: Figure | None = None
    llm_ms: Figure | None = None
    selection_ms: Figure | None = None
    bit_equal: bool | None = None

    @property
    def efficiency(self) -> float | None:
        """Realised over possible gain: of the whole prefill where tokens leave in the encoder, else of the LLM."""
        gain, bound = (
            (self.whole_gain, self.whole_bound) if self.place == "encoder" else (self.gain, self.bound)
        )
        return None if gain is None or not bound else gain.median / bound

    @property
    def share(self) -> float | None:
        """Selection time over the time that the method saves in the LLM; ``None`` when it saves none."""
        if (
            self.kept == 1
            or self.method == BY_HAND
            or self.dense_ms is None
            or self.llm_ms is None
            or self.selection_ms is None
        ):
            return None
        saved = self.dense_ms.median - self.llm_ms.median
        return self.selection_ms.median / saved if saved > 0 else None

    def misses(self) -> list[str]:
        """Aims that are missed, in words."""
        if self.bit_equal is False:
            return ["logits differ from the dense ones"]
        if self.kept is None or self.kept == 1 or self.method == BY_HAND:
            return []
        found = []
        aim = EFFICIENCY["inside" if self.place == "inside" else "before"]
        if self.efficiency is not None and self.efficiency < aim:
            found.append(f"efficiency {self.efficiency:.2f} < {aim}")
        if self.share is not None and self.share > SHARE:
            found.append(f"selection is {self.share:.1%} of what is saved")
        return found


def fill(row: Row, dense: Sequence[Run], own: Sequence[Run]) -> None:
    """Times of paired rounds into ``row``."""
    pairs = list(zip(dense, own, strict=True))
    row.gain = summarise([a.llm / b.llm for a, b in pairs])
    if row.whole_bound is not None:
        row.whole_gain = summarise([a.whole / b.whole for a, b in pairs])
    row.dense_ms = summarise([1000 * run.llm for run in dense])
    row.llm_ms = summarise([1000 * run.llm for run in own])
    row.selection_ms = summarise([1000 * run.selection for run in own])


def print_row(row: Row) -> None:
    keep = "own" if row.keep_ratio is None else f"{row.keep_ratio:g}"
    if row.skipped is not None:
        print(f"{row.method:22}{'':>8}{keep:>6}  skipped: {row.skipped}", flush=True)
        return
    assert row.gain is not None
    assert row.llm_ms is not None
    assert row.selection_ms is not None
    assert row.kept is not None
    eff = "" if row.efficiency is None else f"{row.efficiency:.2f}"
    share = "" if row.share is None else f"{row.share:.1%}"
    equal = "" if row.bit_equal is None else "bit-equal" if row.bit_equal else "NOT BIT-EQUAL"
    whole = "" if row.whole_gain is None else f"{row.whole_gain.median:7.2f}{row.whole_bound:7.2f}"
    gain = f"{row.gain.median:.2f} ±{row.gain.spread or 0:.2f}"
    print(
        f"{row.method:22}{row.place:>8}{keep:>6}{row.kept:7.1%}{row.llm_ms.median:9.0f}{gain:>14}{row.bound:7.2f}"
        f"{eff:>6}{whole:14}{row.selection_ms.median:9.2f}{share:>7}  "
        f"{'; '.join([equal, *row.misses()]).strip('; ')}",
        flush=True,
    )
