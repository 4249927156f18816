"""Fewer tokens in a vision encoder: time per image against its bound, how far features move, what accuracy is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.bench.flops import count_flops
from zoo.bench.quality import cosine
from zoo.bench.record import Figure
from zoo.bench.session import Arm, Session
from zoo.bench.tasks import Desk
from zoo.bench.tasks.pictures import ImageClassification, set_of
from zoo.bench.timing import summarise
from zoo.errors import DownloadFailed
from zoo.families.encoder_tokens import AppliedEncoder
from zoo.interface import Applied

SHOWN = 100
"""Pictures on which accuracy is measured; the task ``image-classification`` shows more."""


def measure_encoder_tokens(session: Session, dense: Arm, method: Arm, inputs: Mapping[str, Any]) -> None:
    """Measure an encoder-token method beside the dense encoder.

    Args:
        session: collects the figures.
        dense, method: both sides.
        inputs: what the image processor made: ``pixel_values [B, 3, H, W]``.
    """
    arms = {"dense": dense, "method": method}
    images = len(inputs["pixel_values"])
    height, width = inputs["pixel_values"].shape[-2:]
    task = f"{images} image{'s' if images > 1 else ''} of {width} x {height}"
    flops: dict[str, float] = {}
    session.progress("counting FLOPs", 0, 2)
    for name, arm in arms.items():
        with arm.forward(inputs) as work:
            flops[name] = count_flops(work) / 1e9 / images
        session.progress("counting FLOPs", len(flops), 2)
    _features(session, arms, inputs, task)
    _accuracy(session, dense, method)

    samples = session.time("timing the encoder", {name: arm.version(inputs) for name, arm in arms.items()})
    session.add(
        "image-time",
        samples["dense"].figure(1000 / images),
        samples["method"].figure(1000 / images),
        task=task,
        bound=flops["dense"] / flops["method"],
        bound_of="ratio of counted FLOPs",
    )
    session.add_exact("flops", flops["dense"], flops["method"], task=f"per image, {task}")
    session.add_peak_memory(arms, inputs, task)
    session.checkpoint()


@torch.no_grad()
def _features(session: Session, arms: Mapping[str, Arm], inputs: Mapping[str, Any], task: str) -> None:
    """Compare the encoder's final tokens, and keep the method's report."""
    found: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}
    for name, arm in arms.items():
        anatomy = arm.loaded.anatomy
        encoder = anatomy.encoder or anatomy.state_space
        assert encoder is not None
        with arm.ready() as applied:
            # A classification head is passed by: features are compared, whatever stands on them.
            bare = getattr(encoder.module, "base_model", encoder.module)
            last = bare(pixel_values=inputs["pixel_values"]).last_hidden_state.float()
            sizes = None
            if arm.methods:
                layer = applied.layers[-1]
                session.record.reports.append(layer.report)
                sizes = _sizes(layer, last.shape[1])
        cls, patches = encoder.split(last)
        weight = torch.ones_like(patches[..., :1]) if sizes is None else encoder.split(sizes.unsqueeze(-1))[1]
        mean = (patches * weight).sum(1) / weight.sum(1)
        found[name] = (cls, mean)
    classes = [found[name][0] for name in ("dense", "method")]
    if classes[0] is not None and classes[1] is not None:
        _similarity(session, "cosine-cls", cosine(classes[0], classes[1]), task)
    _similarity(session, "cosine-mean", cosine(found["dense"][1], found["method"][1]), task)


def _accuracy(session: Session, dense: Arm, method: Arm) -> None:
    """Accuracy and loyalty on held-out pictures, of classifiers whose classes are those of a packaged set."""
    data = set_of(dense.loaded)
    if data is None:
        return
    task = ImageClassification(data=data, limit=SHOWN)
    try:
        session.record.comparisons += task.run(dense, method, Desk(progress=session.progress))
    except DownloadFailed as error:
        session.note(f"Accuracy was not measured, for want of pictures: {error}.")


def _sizes(applied: Applied, tokens: int) -> torch.Tensor | None:
    """How many original tokens each output token stands for, ``[B, N]``; ``None`` when there is one per position."""
    if not isinstance(applied, AppliedEncoder):
        return None
    sources = applied.sources
    return sources.sum(-1) if sources.shape[1] == tokens else None


def _similarity(session: Session, quantity: str, values: list[float], task: str) -> None:
    figure = summarise(values)
    session.add(quantity, None, Figure(median=figure.median, spread=figure.spread, n=figure.n), task=task)
