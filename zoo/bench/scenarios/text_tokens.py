"""Less attention in a text model: prefill or encoding against its bound, cache, and how far the outputs move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from zoo.bench.flops import count_flops
from zoo.bench.memory import cache_bytes
from zoo.bench.quality import next_token_divergence
from zoo.bench.session import Arm, Session, greedy, logit_gap, outputs_of
from zoo.engines.contrastive import embed

NEW_TOKENS = 32


def measure_text_tokens(
    session: Session, dense: Arm, method: Arm, prompt: str, inputs: Mapping[str, Any], *, random: bool
) -> None:
    """Measure a method that prunes inside a decoder beside the dense model.

    Args:
        session: collects the figures.
        dense, method: both sides.
        prompt, inputs: the prompt as text, and what ``generate`` takes, batch 1.
        random: the model's weights are random; said beside its words.
    """
    task = f"{inputs['input_ids'].shape[1]} tokens"
    forward = {**inputs, "use_cache": True, "logits_to_keep": 1}
    samples = _compared(session, dense, method, forward, "prefill-time", task, 1)
    stored = {name: cache_bytes(samples[name].past_key_values) for name in samples}
    session.add_exact("kv-bytes", sum(stored["dense"]) / 1e6, sum(stored["method"]) / 1e6, task=task)
    session.record.bars["KV cache (kB)"] = [
        (own / 1e3, full / 1e3) for own, full in zip(stored["method"], stored["dense"], strict=True)
    ]
    agreement, kl = next_token_divergence(*(samples[name].logits[:, -1] for name in ("dense", "method")))
    session.add_fidelity("first-token-agreement", agreement, task=task)
    session.add_fidelity("kl", kl, task=f"first token, {task}")
    session.checkpoint()
    _generation(session, dense, method, prompt, inputs, random)


def measure_embedding_tokens(
    session: Session, dense: Arm, method: Arm, passages: torch.Tensor, task: str
) -> None:
    """Measure a method that prunes inside a text encoder beside the dense one.

    Args:
        session: collects the figures.
        dense, method: both sides.
        passages: token ids ``[items, T]``.
        task: names that text.
    """
    passages = passages.to(session.device)
    inputs = {"input_ids": passages, "attention_mask": torch.ones_like(passages)}
    _compared(session, dense, method, inputs, "text-time", task, len(passages))
    embedded = []
    for arm in (dense, method):
        with torch.no_grad(), arm.ready() as applied:
            embedded.append(embed(applied.loaded.anatomy, passages).float())
    similarity = F.cosine_similarity(embedded[0], embedded[1])
    session.add_fidelity("cosine-text", float(similarity.mean()), n=len(passages), task=task)
    session.checkpoint()


def _compared(
    session: Session, dense: Arm, method: Arm, inputs: Mapping[str, Any], quantity: str, task: str, items: int
) -> dict[str, Any]:
    """Time, FLOPs and memory of one forward pass, per item; returns what both sides gave."""
    arms = {"dense": dense, "method": method}
    flops: dict[str, float] = {}
    session.progress("counting FLOPs", 0, 2)
    for name, arm in arms.items():
        with arm.forward(inputs) as work:
            flops[name] = count_flops(work) / 1e9 / items
        session.progress("counting FLOPs", len(flops), 2)
    with torch.no_grad(), method.ready() as applied:
        applied(**inputs)
        session.record.reports += applied.reports
    samples = session.time(
        "timing the forward pass", {name: arm.version(inputs) for name, arm in arms.items()}
    )
    session.add(
        quantity,
        samples["dense"].figure(1000 / items),
        samples["method"].figure(1000 / items),
        task=task,
        bound=flops["dense"] / flops["method"],
        bound_of="ratio of counted FLOPs",
    )
    session.add_exact("flops", flops["dense"], flops["method"], task=task)
    session.add_peak_memory(arms, inputs, task)
    return {name: sample.result for name, sample in samples.items()}


def _generation(
    session: Session, dense: Arm, method: Arm, prompt: str, inputs: Mapping[str, Any], random: bool
) -> None:
    """Both texts, and how far they agree."""
    tokenizer = dense.loaded.tokenizer
    new_tokens = session.settings.new_tokens or NEW_TOKENS
    options = {**inputs, **greedy(tokenizer, new_tokens)}
    length = inputs["input_ids"].shape[1]
    ids: dict[str, list[int]] = {}
    session.progress("generating with both models", 0, 2)
    for name, arm in (("dense", dense), ("method", method)):
        with torch.no_grad(), arm.ready() as applied:
            ids[name] = applied.generate(**options)[0, length:].tolist()
        session.progress("generating with both models", len(ids), 2)
    outputs = outputs_of(
        tokenizer, prompt, ids["dense"], ids["method"],
        gap=lambda place: logit_gap(dense.loaded.model, inputs, ids["dense"][:place]),
    )  # fmt: skip
    outputs.meaningless = random
    session.record.outputs = outputs
    session.add_fidelity("identical-tokens", outputs.common / max(1, len(ids["dense"])), n=len(ids["dense"]))
