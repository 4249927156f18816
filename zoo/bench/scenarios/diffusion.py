"""Cheaper denoising: a step against its bound, a whole picture with the work before it, and how far a step moves."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.bench.flops import count_flops
from zoo.bench.quality import cosine
from zoo.bench.record import Figure
from zoo.bench.session import Arm, Session
from zoo.bench.timing import steady, stopwatch, summarise

STEPS = 20
"""Denoising steps of the picture that is made."""


def measure_diffusion(session: Session, dense: Arm, method: Arm, prompt: str, seed: int = 0) -> None:
    """Measure a diffusion method beside the plain text-to-image model.

    Args:
        session: collects the figures.
        dense, method: both sides.
        prompt: what the picture shall show.
        seed: of the noise that both sides begin with.
    """
    arms = {"dense": dense, "method": method}
    inputs = _first_step(dense, prompt, seed)
    height, width = inputs["sample"].shape[-2:]
    task = f"latents of {height} x {width}, guidance"
    flops: dict[str, float] = {}
    session.progress("counting FLOPs", 0, 2)
    for name, arm in arms.items():
        with arm.forward(inputs) as work:
            flops[name] = count_flops(work) / 1e9
        session.progress("counting FLOPs", len(flops), 2)

    samples = session.time(
        "timing a denoising step", {name: arm.version(inputs) for name, arm in arms.items()}
    )
    session.add(
        "step-time",
        samples["dense"].figure(1000),
        samples["method"].figure(1000),
        task=task,
        bound=flops["dense"] / flops["method"],
        bound_of="ratio of counted FLOPs",
    )
    session.add_exact("flops", flops["dense"], flops["method"], task=f"per step, {task}")
    likeness = summarise(cosine(samples["dense"].result.flatten(1), samples["method"].result.flatten(1)))
    session.add(
        "cosine-noise", None, Figure(median=likeness.median, spread=likeness.spread, n=likeness.n), task=task
    )
    session.add_peak_memory(arms, inputs, task)
    session.checkpoint()
    _pictures(session, arms, prompt, seed)


def _first_step(arm: Arm, prompt: str, seed: int) -> dict[str, Any]:
    """Inputs of the sampler's first step: without and with the prompt, ``sample [2, C, h, w]``."""
    model = arm.loaded.model
    sampler = model.pipeline.scheduler
    sampler.set_timesteps(STEPS, device=arm.loaded.device)
    first = sampler.timesteps[0]
    sample = sampler.scale_model_input(model.noise(2, seed) * sampler.init_noise_sigma, first)
    return {"sample": sample, "timestep": first, "encoder_hidden_states": model.encode(["", prompt])}


def _pictures(session: Session, arms: dict[str, Arm], prompt: str, seed: int) -> None:
    """Make one picture with each side, and time it: work on the initial noise is part of it."""
    watch = stopwatch(session.device)
    seconds: list[float] = []
    for name, arm in arms.items():
        session.progress(f"making a picture ({name})", len(seconds), 2)
        with arm.ready() as applied, steady(session.device):
            work = partial(applied.generate, prompt=prompt, steps=STEPS, seed=seed)
            seconds.append(watch(work)[0])
            if arm.methods:
                session.record.reports += [layer.report for layer in applied.layers]
    session.add_exact("picture-time", seconds[0], seconds[1], task=f"{STEPS} steps")
