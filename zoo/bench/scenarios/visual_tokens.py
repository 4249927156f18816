"""Shortened visual sequences: prefill against its bound, cache, selection cost, first token, both outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from zoo.bench.flops import count_flops
from zoo.bench.memory import cache_bytes
from zoo.bench.quality import next_token_divergence
from zoo.bench.record import Figure
from zoo.bench.session import Arm, Session, greedy, outputs_of
from zoo.bench.timing import Version, summarise
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.families.encoder_tokens import AppliedEncoder
from zoo.families.visual_tokens import AppliedTokens, VisualTokenReducer

NEW_TOKENS = 24


def measure_visual_tokens(
    session: Session, dense: Arm, method: Arm, prompt: str, inputs: Mapping[str, Any], *, random: bool
) -> None:
    """Measure a visual-token method (possibly in a stack) beside the dense model.

    Args:
        session: collects the figures.
        dense, method: both sides.
        prompt, inputs: the prompt as text, and the processor's output: ids and pixels, batch 1.
        random: the model's weights are random; said beside its words.
    """
    forward = {**inputs, "use_cache": True, "logits_to_keep": 1}
    arms = {"dense": dense, "method": method}
    flops: dict[str, float] = {}
    kept: dict[int, list[torch.Tensor]] = {}
    session.progress("counting FLOPs", 0, 2)
    for name, arm in arms.items():
        with arm.forward(forward) as work:
            flops[name] = count_flops(work) / 1e9
        session.progress("counting FLOPs", len(flops), 2)
    with torch.no_grad(), method.ready() as applied:
        applied(**forward)
        for layer in applied.layers:
            if isinstance(layer, AppliedTokens):
                kept = {place: [rows.clone() for rows in lists] for place, lists in layer.kept.items()}
            if isinstance(layer, AppliedTokens | AppliedEncoder):
                session.record.reports += layer.reports
    task = _task(inputs, session.record)

    versions: dict[str, Version] = {name: arm.version(forward) for name, arm in arms.items()}
    if kept and len(method.methods) == 1 and isinstance(method.methods[0], VisualTokenReducer):
        versions["replay"] = partial(_replay, method, kept, forward)
    samples = session.time("timing the prefill", versions)
    figures = {name: sample.figure(1000) for name, sample in samples.items()}
    session.add(
        "prefill-time",
        figures["dense"],
        figures["method"],
        task=task,
        bound=flops["dense"] / flops["method"],
        bound_of="ratio of counted FLOPs, encoder included",
    )
    if "replay" in samples:
        costs = [
            1000 * (a - b) for a, b in zip(samples["method"].seconds, samples["replay"].seconds, strict=True)
        ]
        session.add("selection-time", None, _cost(costs), task=task)
    session.add_exact("flops", flops["dense"], flops["method"], task=task)

    stored = {name: cache_bytes(samples[name].result.past_key_values) for name in arms}
    session.add_exact("kv-bytes", sum(stored["dense"]) / 1e6, sum(stored["method"]) / 1e6, task=task)
    session.record.bars["KV cache (kB)"] = [
        (own / 1e3, full / 1e3) for own, full in zip(stored["method"], stored["dense"], strict=True)
    ]
    agreement, kl = next_token_divergence(
        *(samples[name].result.logits[:, -1] for name in ("dense", "method"))
    )
    session.add_fidelity("first-token-agreement", agreement, task=task)
    session.add_fidelity("kl", kl, task=f"first token, {task}")
    session.add_peak_memory(arms, forward, task)
    session.checkpoint()
    _outputs(session, arms, prompt, inputs, random)


def _task(inputs: Mapping[str, Any], record: Any) -> str:
    length = inputs["input_ids"].shape[1]
    visual = next((round(r.total) for r in record.reports if r.unit.startswith("visual tokens")), None)
    return f"{length} tokens" + (f", {visual} of them visual" if visual else "")


def _cost(milliseconds: list[float]) -> Figure:
    # Noise can make a negligible cost come out negative, which nothing can be.
    figure = summarise(milliseconds)
    return Figure(median=max(0.0, figure.median), spread=figure.spread, n=figure.n)


@contextmanager
def _replay(
    method: Arm, kept: dict[int, list[torch.Tensor]], forward: Mapping[str, Any]
) -> Iterator[Callable[[], Any]]:
    """The same forward pass with the choice given beforehand: what remains of the time is not selection."""

    def stage(layer: int) -> Stage:
        turn = [0]

        def select(view: View) -> Keep:
            chosen = kept[layer][turn[0] % len(kept[layer])]
            turn[0] += 1
            return Keep(torch.isin(view.original, chosen).nonzero().squeeze(-1).unsqueeze(0))

        return Stage(layer, select)

    (only,) = method.methods
    assert isinstance(only, VisualTokenReducer)
    model = method.loaded.model
    reducer = TokenReducer(method.loaded.anatomy, [stage(layer) for layer in kept], only.positions, only.slug)
    try:
        with torch.no_grad():
            yield lambda: model(**forward)
    finally:
        reducer.close()


def _outputs(
    session: Session, arms: Mapping[str, Arm], prompt: str, inputs: Mapping[str, Any], random: bool
) -> None:
    tokenizer = arms["dense"].loaded.tokenizer
    options = {**inputs, **greedy(tokenizer, session.settings.new_tokens or NEW_TOKENS)}
    length = inputs["input_ids"].shape[1]
    ids: dict[str, list[int]] = {}
    session.progress("generating with both models", 0, 2)
    for name, arm in arms.items():
        with torch.no_grad(), arm.ready() as applied:
            ids[name] = applied.generate(**options)[0, length:].tolist()
        session.progress("generating with both models", len(ids), 2)
    session.record.outputs = outputs_of(tokenizer, prompt, ids["dense"], ids["method"])
    session.record.outputs.meaningless = random
