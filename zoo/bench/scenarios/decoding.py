"""Accelerated decoding: plain greedy beside the method, on the same prompt."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from zoo.bench.record import Comparison, Piece
from zoo.bench.session import Arm, Session, greedy, logit_gap, outputs_of
from zoo.bench.timing import Samples, steady, summarise
from zoo.engines.decoding import Step
from zoo.families.decoding import AppliedDecoder
from zoo.report import DecodingStats

OnStep = Callable[[Step], None]
Watch = Callable[[Any], AbstractContextManager[OnStep]]
"""Given the tokenizer, something to be called with every step of a generation while it is entered."""

NEW_TOKENS = 64
TIE = 1e-2
"""A logit gap below this, at the first difference, is put down to rounding."""


def measure_decoding(
    session: Session,
    dense: Arm,
    method: Arm,
    prompt: str,
    inputs: Mapping[str, Any],
    *,
    same_weights: bool,
    watch: Watch | None = None,
) -> None:
    """Measure ``method`` (its last method a decoder) beside plain greedy decoding by ``dense``.

    Args:
        session: collects the figures.
        dense, method: both sides.
        prompt, inputs: the prompt as text, and what ``generate`` takes, batch 1.
        same_weights: both sides compute the same function, so a lossless method must give the same tokens.
        watch: follows one generation of the method, before those that are timed.
    """
    tokenizer = dense.loaded.tokenizer
    new_tokens = session.settings.new_tokens or NEW_TOKENS
    options = {**inputs, **greedy(tokenizer, new_tokens)}
    first: dict[str, list[float]] = {"dense": [], "method": []}
    if watch is not None:
        _show(method, options, watch(tokenizer))
    arms = {"dense": dense, "method": method}
    samples = session.time(
        "timing generation",
        {name: partial(_generation, arm, options, first[name]) for name, arm in arms.items()},
    )
    length = inputs["input_ids"].shape[1]
    ids = {name: sample.result[0][0, length:].tolist() for name, sample in samples.items()}
    report, trace = samples["method"].result[1:]
    session.record.reports.append(report)
    gain = _speed(session, samples, first, ids, report.decoding, length).gain
    if gain is not None and gain < 1 and getattr(method.methods[-1], "budget", None) == "fixed":
        session.note(
            "Verifying whole drafts costs more here than it saves; --set budget=auto verifies only what pays."
        )

    outputs = outputs_of(
        tokenizer, prompt, ids["dense"], ids["method"],
        gap=lambda place: logit_gap(dense.loaded.model, inputs, ids["dense"][:place]),
    )  # fmt: skip
    outputs.pieces = pieces_of(tokenizer, trace)
    session.record.outputs = outputs
    session.add_fidelity("identical-tokens", outputs.common / max(1, len(ids["dense"])), n=len(ids["dense"]))
    if same_weights and not outputs.identical:
        session.note(_difference(outputs.common, outputs.gap))
    session.checkpoint()


def _show(arm: Arm, options: Mapping[str, Any], following: AbstractContextManager[OnStep]) -> None:
    """One generation for the eyes: it is not timed."""
    with steady(arm.loaded.device), torch.no_grad(), arm.ready() as applied, following as on_step:
        decoder = applied.layers[-1]
        assert isinstance(decoder, AppliedDecoder)
        decoder.on_step = on_step
        applied.generate(**options)


def _difference(place: int, gap: float | None) -> str:
    where = f"The outputs differ from token {place + 1} on"
    if gap is None:
        return f"{where}: one of them ends there."
    if gap < TIE:
        return (
            f"{where}: a tie of the arithmetic (the two best logits are {gap:.2g} apart), which passes of different "
            "lengths round differently."
        )
    return f"{where}, where the two best logits are {gap:.2g} apart: too far for a tie of the arithmetic."


def _speed(
    session: Session,
    samples: dict[str, Samples],
    first: dict[str, list[float]],
    ids: dict[str, list[int]],
    stats: DecodingStats,
    length: int,
) -> Comparison:
    """Add the figures of both sides; returns the one of the whole generation."""
    task = f"{len(ids['method'])} tokens after {length}"
    whole = session.add(
        "generation-speed",
        samples["dense"].rate(len(ids["dense"])),
        samples["method"].rate(len(ids["method"])),
        task=task,
    )
    decode: dict[str, list[float]] = {}
    for name, sample in samples.items():
        # Rounds that were thrown away left a stamp too; those of the complete rounds follow them.
        warm = len(first[name]) - len(sample.seconds)
        stamps = first[name][max(0, warm) :]
        decode[name] = [total - begun for total, begun in zip(sample.seconds, stamps, strict=False)]
    more = {name: len(ids[name]) - 1 for name in ids}  # the first token is the prefill's
    if min(more.values()) > 0 and stats.steps:
        step = statistics.median(decode["dense"]) / more["dense"]
        busy = statistics.median(decode["method"])
        elapsed = stats.draft_seconds + stats.verify_seconds + stats.overhead_seconds
        verify = busy * stats.verify_seconds / elapsed / stats.steps / step
        draft = busy * stats.draft_seconds / elapsed / stats.steps / step
        session.add(
            "decode-speed",
            summarise([more["dense"] / seconds for seconds in decode["dense"]]),
            summarise([more["method"] / seconds for seconds in decode["method"]]),
            task=task,
            bound=stats.tokens_per_step / (verify + draft),
            bound_of="tokens per step / (verify + draft), in plain steps: "
            f"{stats.tokens_per_step:.2f} / ({verify:.2f} + {draft:.2f})",
        )
    session.add_exact("tokens-per-step", 1.0, stats.tokens_per_step, n=max(1, stats.steps), task=task)
    return whole


@contextmanager
def _generation(arm: Arm, options: Mapping[str, Any], first: list[float]) -> Iterator[Callable[[], Any]]:
    """A version for ``alternate``: one generation; the seconds until its first token are appended to ``first``.

    The work returns ids ``[1, length]``, the report and the trace of the last method (none on the dense side).
    """
    clock = _FirstToken(arm.loaded.device)
    with torch.no_grad(), arm.ready() as applied:
        decoder = applied.layers[-1]

        def work() -> Any:
            clock.begin()
            ids = applied.generate(**options, streamer=clock)
            first.append(clock.seconds)
            if not isinstance(decoder, AppliedDecoder):
                return ids, None, []
            return ids, decoder.report, decoder.trace

        yield work


class _FirstToken:
    """A streamer that takes the time at which the first token arrives (after the prompt, which comes first)."""

    def __init__(self, device: torch.device) -> None:
        self._now = time.perf_counter if device.type == "cuda" else time.process_time
        self.begin()

    def begin(self) -> None:
        self.seconds = 0.0
        self._calls = 0
        self._start = self._now()

    def put(self, value: Any) -> None:
        self._calls += 1
        if self._calls == 2:
            self.seconds = self._now() - self._start

    def end(self) -> None:
        """Nothing is held back."""


def pieces_of(tokenizer: Any, trace: Any) -> list[Piece]:
    """The generated text cut where accepted drafts begin and end.

    Text is decoded from the start each time, because a token's characters depend on its neighbours; half a character
    waits for its other half.
    """
    ids: list[int] = []
    done = ""
    pieces: list[Piece] = []
    for step in trace:
        for tokens, accepted in ((step.tokens[: step.accepted], True), (step.tokens[step.accepted :], False)):
            if not tokens:
                continue
            ids.extend(tokens)
            text = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
            if not text.startswith(done) or text == done:
                continue
            piece, done = text[len(done) :], text
            if pieces and pieces[-1].accepted == accepted:
                pieces[-1] = Piece(text=pieces[-1].text + piece, accepted=accepted)
            else:
                pieces.append(Piece(text=piece, accepted=accepted))
    return pieces
