"""Pruned weights: quality on held-out text, prefill and decode speed against their bounds, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from zoo.bench.flops import count_flops
from zoo.bench.memory import bytes_per_decode_step, cache_bytes, parameter_bytes, parameter_count
from zoo.bench.quality import language_quality
from zoo.bench.session import Arm, Session, greedy, logit_gap, outputs_of
from zoo.engines.contrastive import embed, triplets_of
from zoo.models import LoadedModel

STEPS = 24
"""Decode steps per timed round."""


def measure_weights(
    session: Session,
    dense: LoadedModel,
    pruned: LoadedModel,
    heldout: torch.Tensor,
    task: str,
    prompt: str,
    inputs: Any,
) -> None:
    """Measure ``pruned`` beside ``dense``.

    Args:
        session: collects the figures.
        dense, pruned: causal language models on one device.
        heldout: token ids ``[windows, T]`` that calibration has not seen.
        task: names that text and the protocol.
        prompt, inputs: a prompt as text and as the tokenizer's output, for both generated outputs.
    """
    _memory(session, dense, pruned)
    _quality(session, dense, pruned, heldout, task)
    _prefill(session, dense, pruned, heldout)
    session.checkpoint()
    _decode(session, dense, pruned, heldout)
    session.checkpoint()
    _outputs(session, dense, pruned, prompt, inputs)


@torch.no_grad()
def measure_embedding_weights(
    session: Session, dense: LoadedModel, pruned: LoadedModel, heldout: torch.Tensor, task: str
) -> None:
    """Measure a text encoder whose weights were pruned beside the dense one.

    Args:
        session: collects the figures.
        dense, pruned: on one device.
        heldout: token ids ``[windows, T]``; the two halves of a window are a passage and its continuation.
        task: names that text.
    """
    _memory(session, dense, pruned)
    session.progress("comparing embeddings of held-out text", 0, 1)
    triplets = triplets_of(heldout, dense.tokenizer)
    found, passages = [], []
    for loaded in (dense, pruned):
        first, second = (embed(loaded.anatomy, ids).float() for ids in (triplets.query, triplets.positive))
        nearest = (functional.normalize(first) @ functional.normalize(second).T).argmax(1)
        found.append(float((nearest == torch.arange(len(first), device=nearest.device)).float().mean()))
        passages.append(first)
    session.add_exact("retrieval", found[0], found[1], n=len(heldout), task=task)
    similarity = functional.cosine_similarity(passages[0], passages[1])
    session.add_fidelity("cosine-text", float(similarity.mean()), n=len(heldout), task=task)


def _memory(session: Session, dense: LoadedModel, pruned: LoadedModel) -> None:
    counts = [parameter_count(loaded.model) / 1e6 for loaded in (dense, pruned)]
    session.add_exact("parameters", *counts)
    session.add_exact("weight-bytes", *(parameter_bytes(loaded.model) / 1e6 for loaded in (dense, pruned)))
    if counts[0] == counts[1] and _nonzero(pruned) < _nonzero(dense):
        session.note(
            "Weights that became zero are stored like all others: without kernels for sparse matrices, neither memory "
            "nor time falls."
        )


def _nonzero(loaded: LoadedModel) -> int:
    return sum(int(torch.count_nonzero(parameter)) for parameter in loaded.model.parameters())


def _quality(
    session: Session, dense: LoadedModel, pruned: LoadedModel, heldout: torch.Tensor, task: str
) -> None:
    total = len(heldout)
    what = "comparing predictions on held-out text"
    session.progress(what, 0, total)
    quality = language_quality(
        dense.model, pruned.model, heldout, progress=lambda done: session.progress(what, done, total)
    )
    for value, whose in ((quality.dense_perplexity, "dense"), (quality.method_perplexity, "pruned")):
        if not math.isfinite(value):
            session.note(f"The {whose} model's perplexity is not a finite number: it is broken on this text.")
    if math.isfinite(quality.dense_perplexity) and math.isfinite(quality.method_perplexity):
        session.add_exact(
            "perplexity", quality.dense_perplexity, quality.method_perplexity, n=quality.tokens, task=task
        )
    session.add_fidelity("agreement", quality.agreement, n=quality.tokens, task=task)
    if math.isfinite(quality.kl):
        session.add_fidelity("kl", quality.kl, n=quality.tokens, task=task)


def _prefill(session: Session, dense: LoadedModel, pruned: LoadedModel, heldout: torch.Tensor) -> None:
    ids = heldout.reshape(1, -1)[:, : session.settings.prompt].to(session.device)
    task = f"{ids.shape[1]} tokens, batch 1"
    inputs = {"input_ids": ids, "use_cache": True, "logits_to_keep": 1}
    arms = {"dense": Arm(dense), "method": Arm(pruned)}
    flops = {name: count_flops(partial(arm.loaded.model, **inputs)) / 1e9 for name, arm in arms.items()}
    bound = flops["dense"] / flops["method"]
    samples = session.time("timing the prefill", {name: arm.version(inputs) for name, arm in arms.items()})
    session.add(
        "prefill-time",
        samples["dense"].figure(1000),
        samples["method"].figure(1000),
        task=task,
        bound=bound,
        bound_of="ratio of counted FLOPs",
    )
    session.add_exact("flops", flops["dense"], flops["method"], task=task)
    cached = {name: sum(cache_bytes(sample.result.past_key_values)) / 1e6 for name, sample in samples.items()}
    session.add_exact("kv-bytes", cached["dense"], cached["method"], task=task)
    session.add_peak_memory(arms, inputs, task)


def _decode(session: Session, dense: LoadedModel, pruned: LoadedModel, heldout: torch.Tensor) -> None:
    ids = heldout.reshape(1, -1)[:, : max(1, session.settings.prompt // 2)].to(session.device)
    models = {"dense": dense, "method": pruned}
    samples = session.time(
        "timing the decoding",
        {name: partial(_steps, loaded, ids) for name, loaded in models.items()},
    )
    reads = {}
    for name, loaded in models.items():
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        reads[name] = bytes_per_decode_step(decoder, sum(cache_bytes(samples[name].result)))
    session.add(
        "decode-speed",
        samples["dense"].rate(STEPS),
        samples["method"].rate(STEPS),
        task=f"{STEPS} tokens after {ids.shape[1]}",
        bound=reads["dense"] / reads["method"],
        bound_of="ratio of bytes read per token: weights, head and cache",
    )


@contextmanager
def _steps(loaded: LoadedModel, ids: torch.Tensor) -> Iterator[Callable[[], Any]]:
    """Greedy single-token steps on a filled cache; the prefill is not timed. The work returns the cache."""
    model = loaded.model
    with torch.no_grad():
        filled = model(input_ids=ids, use_cache=True, logits_to_keep=1)

        def work() -> Any:
            cache, logits = filled.past_key_values, filled.logits
            for _ in range(STEPS):
                logits = model(
                    input_ids=logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True
                ).logits
            # The next token is only known when the computation is over, on a GPU too.
            logits[0, -1].argmax().item()
            return cache

        yield work


def _outputs(session: Session, dense: LoadedModel, pruned: LoadedModel, prompt: str, inputs: Any) -> None:
    session.progress("generating with both models", 0, 2)
    options = greedy(dense.tokenizer, session.settings.new_tokens or 48)
    length = inputs["input_ids"].shape[1]
    ids: dict[str, list[int]] = {}
    for name, loaded in (("dense", dense), ("method", pruned)):
        ids[name] = loaded.model.generate(**inputs, **options)[0, length:].tolist()
        session.progress("generating with both models", len(ids), 2)
    session.record.outputs = outputs_of(
        dense.tokenizer,
        prompt,
        ids["dense"],
        ids["method"],
        gap=lambda place: logit_gap(dense.model, inputs, ids["dense"][:place]),
    )
