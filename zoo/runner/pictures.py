"""Pictures of the tokens that stay, made after measuring: watching must not slow what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from zoo.bench.session import Arm, Session
from zoo.families.visual_tokens import AppliedTokens
from zoo.overlays import draw, record, save_picture
from zoo.patch_pictures import draw_patches, record_patches
from zoo.runner.request import DRAWN, Job


def is_wanted(job: Job) -> bool:
    """Whether a picture was asked for, by itself or for the report, and there is something to draw."""
    asked = job.request.overlay is not None or job.request.report is not None
    return asked and bool(job.phases & DRAWN)


def draw_visual_tokens(job: Job, session: Session, arm: Arm, inputs: Mapping[str, Any]) -> None:
    """Draw the visual tokens of a vision-language model that stay, in one more forward pass."""
    session.progress("drawing the visual tokens", 0, 0)
    with arm.ready() as applied:
        chooses = any(isinstance(layer, AppliedTokens) for layer in applied.layers)
        trace = record(applied, **inputs)[0] if chooses else None
    if trace is None or not trace.steps:
        session.note("Every visual token stays, so there is no overlay to draw.")
        return
    _save(job, session, draw(trace, _title(session)))


def draw_encoder_patches(job: Job, session: Session, arm: Arm, pixels: Mapping[str, Any]) -> None:
    """Draw what the tokens of the first picture hold, in one more forward pass of the encoder."""
    session.progress("drawing the patches", 0, 0)
    with arm.ready() as applied:
        first = record_patches(applied, **pixels)[0]
    _save(job, session, draw_patches(first, _title(session)))


def _title(session: Session) -> str:
    return f"{session.record.method} on {session.record.model.ref}"


def _save(job: Job, session: Session, picture: Image.Image) -> None:
    """Write the picture wherever it was asked for; the record names the first of these files."""
    request = job.request
    files = [request.overlay, None if request.report is None else request.report / "overlay.png"]
    saved = [save_picture(picture, file) for file in files if file is not None]
    session.record.inputs["overlay"] = str(saved[0])
