"""Both sides beside each other: which inputs, which models and which scenario each kind of method is measured with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.bench.scenarios import (
    measure_decoding,
    measure_diffusion,
    measure_embedding_tokens,
    measure_embedding_weights,
    measure_encoder_tokens,
    measure_text_tokens,
    measure_visual_tokens,
    measure_weights,
)
from zoo.bench.session import Arm, Session
from zoo.bench.tasks import Desk, Task
from zoo.models import LoadedModel
from zoo.models.names import KNOWN
from zoo.models.quiet import quiet_transformers
from zoo.runner import pictures
from zoo.runner.inputs import picture_inputs, text_inputs
from zoo.runner.kinds import Kind
from zoo.runner.pruning import Draft, made_draft, pruned_model
from zoo.runner.request import DRAWN, Job
from zoo.runner.texts import heldout_passages, heldout_windows

PICTURE_PROMPT = "a cat and a frog on a bench"
PASSAGES = 8
"""Texts in the batch on which a method inside a text encoder is timed."""

_DOES: dict[Kind, str] = {
    "text": "writes",
    "vlm": "writes",
    "image": "sees",
    "embedding": "embeds",
    "diffusion": "draws",
}
"""What means nothing when the weights are random."""


def measure(job: Job, session: Session, loaded: LoadedModel, draft: Draft) -> None:
    """Apply the methods and measure them beside ``loaded``; the session's record grows as figures come in.

    Args:
        job: what is asked.
        session: collects the figures.
        loaded: the dense model.
        draft: the draft model, or the weight method that makes one out of ``loaded``.
    """
    cuda = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), quiet_transformers():
        torch.manual_seed(job.request.seed)
        if job.request.task is None:
            _side_by_side(job, session, loaded, draft)
        else:
            _ask(job, session, loaded, draft, job.request.task)


def _ask(job: Job, session: Session, loaded: LoadedModel, draft: Draft, task: Task) -> None:
    """Put the task to the dense model and, if there is one, to the method."""
    record = session.record
    record.inputs["task"] = {"name": task.name, **task.model_dump(mode="json")}
    draft = made_draft(job, draft, loaded)
    arm = _method_arm(job, pruned_model(job, record, loaded), draft) if job.methods else None
    desk = Desk(job.request.seed, job.progress, job.kept)
    for row in task.run(Arm(loaded), arm, desk):
        record.comparisons.append(row)
    if arm is not None:
        record.reports += arm.reports


def _side_by_side(job: Job, session: Session, loaded: LoadedModel, draft: Draft) -> None:
    """Measure what suits the family: the pruned weights first, then what acts while the model runs."""
    inputs: dict[str, Any] = {}  # of diffusion and embedding models: the scenario makes them
    if job.kind in ("text", "vlm"):
        inputs = text_inputs(job, session.record, loaded)
    elif job.kind == "image":
        inputs = picture_inputs(job, session.record, loaded)
    draft = made_draft(job, draft, loaded)
    own = loaded
    if job.pruner is not None:
        own = _measure_pruning(job, session, loaded, inputs)
    if not job.reversible:
        return
    dense, arm = Arm(loaded), _method_arm(job, own, draft)
    if job.kind == "diffusion":
        _measure_diffusion(job, session, dense, arm)
    elif job.kind == "image":
        _measure_encoder(job, session, dense, arm, inputs)
    elif job.kind == "embedding":
        measure_embedding_tokens(session, dense, arm, *heldout_passages(loaded, PASSAGES))
    else:
        _measure_generation(job, session, dense, arm, inputs)


def _method_arm(job: Job, own: LoadedModel, draft: LoadedModel | None) -> Arm:
    """The method's side: the pruned model if there is one, and the methods that act while it runs."""
    given = {} if draft is None else {"draft": draft}
    resources = {method.slug: given for method in job.reversible if method.phase == "decoding"}
    return Arm(own, job.reversible, resources)


# --- one scenario each ----------------------------------------------------------------------------------------


def _measure_pruning(
    job: Job, session: Session, loaded: LoadedModel, inputs: Mapping[str, Any]
) -> LoadedModel:
    """Prune, save when asked, measure; returns the pruned model."""
    embeds = job.kind == "embedding"
    heldout, task = heldout_passages(loaded) if embeds else heldout_windows(loaded, job.settings)
    session.record.inputs["held-out text"] = task
    pruned = pruned_model(job, session.record, loaded)
    if embeds:
        measure_embedding_weights(session, loaded, pruned, heldout, task)
    else:
        measure_weights(session, loaded, pruned, heldout, task, _prompt(session), inputs)
    return pruned


def _measure_diffusion(job: Job, session: Session, dense: Arm, arm: Arm) -> None:
    prompt = session.record.inputs["prompt"] = job.request.prompt or PICTURE_PROMPT
    _note_random_weights(job, session, dense)
    measure_diffusion(session, dense, arm, prompt, job.request.seed)


def _measure_encoder(job: Job, session: Session, dense: Arm, arm: Arm, pixels: Mapping[str, Any]) -> None:
    _note_random_weights(job, session, dense)
    measure_encoder_tokens(session, dense, arm, pixels)
    if pictures.is_wanted(job):
        pictures.draw_encoder_patches(job, session, arm, pixels)


def _measure_generation(job: Job, session: Session, dense: Arm, arm: Arm, inputs: Mapping[str, Any]) -> None:
    """Models that write: what leaves the cache, what leaves the picture, and how tokens are drafted."""
    prompt = _prompt(session)
    if "cache" in job.phases:
        random = _note_random_weights(job, session, dense)
        measure_text_tokens(session, dense, arm, prompt, inputs, random=random)
    if job.phases & DRAWN:
        random = _note_random_weights(job, session, dense)
        measure_visual_tokens(session, dense, arm, prompt, inputs, random=random)
        if pictures.is_wanted(job):
            pictures.draw_visual_tokens(job, session, arm, inputs)
    if "decoding" in job.phases:
        measure_decoding(
            session, dense, arm, prompt, inputs, same_weights=job.phases == {"decoding"}, watch=job.watch
        )


def _prompt(session: Session) -> str:
    return str(session.record.inputs["prompt"])


def _note_random_weights(job: Job, session: Session, dense: Arm) -> bool:
    """Whether the weights are random, which is then said beside the figures."""
    ref = dense.loaded.ref
    random = ref in KNOWN and KNOWN[ref].random
    if random:
        session.note(
            f"The weights of {ref} are random: selection, lengths, memory and time are real, "
            f"what it {_DOES[job.kind]} means nothing."
        )
    return random
