"""Smaller models that a run makes: the pruned one that is measured, and a draft model out of the target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo import data
from zoo.bench.record import RunRecord
from zoo.errors import BadInput
from zoo.interface import Applied, Method, Stack, implemented
from zoo.interface import method as make_method
from zoo.models import LoadedModel
from zoo.runner.commands import parse_assignments
from zoo.runner.inputs import context
from zoo.runner.request import CALIBRATION_LENGTH, Job

Draft = LoadedModel | Method | None
"""A draft model, or the weight method that is to make one out of the target."""


def pruned_model(job: Job, record: RunRecord, loaded: LoadedModel) -> LoadedModel:
    """``loaded`` pruned, reported, and saved when asked; itself where no method of the job prunes weights.

    What the last run on this model made is taken again when it is equal.
    """
    pruner, request = job.pruner, job.request
    if pruner is None:
        return loaded
    if request.calibration is None:
        name, texts = "news, calibration split", data.load_texts("news", split="calibration")
    else:
        name, texts = str(request.calibration), data.load_texts(request.calibration)
    windows = [request.calibration_windows, _window(loaded)]
    record.inputs |= {
        "calibration": name,
        "calibration sha256": data.digest(texts),
        "calibration windows": windows,
    }

    def prune() -> Applied:
        return _apply(job, pruner, loaded, f"pruning with {pruner.slug}", calibration=texts)

    if job.kept is None:
        applied = prune()
    else:
        asked = [pruner.slug, pruner.parameters(), data.digest(texts), windows, request.seed]
        applied = job.kept.once("pruned model", json.dumps(asked, sort_keys=True), prune)
    record.reports.append(applied.report)
    if request.save is not None:
        job.progress(f"saving to {request.save}", 0, 0)
        record.saved = str(applied.save(request.save))
    return applied.loaded


def made_draft(job: Job, draft: Draft, target: LoadedModel) -> LoadedModel | None:
    """The draft model, made now when it is to be the target pruned (on calibration text of the method's choice)."""
    if isinstance(draft, Method):
        return _apply(job, draft, target, f"pruning a draft model with {draft.slug}").loaded
    return draft


def draft_pruner(draft: str) -> Method | None:
    """The method of ``METHOD:name=value,...``; ``None`` when ``draft`` names a model.

    Raises:
        BadInput: it prunes no weights.
    """
    slug, _, settings = draft.partition(":")
    if slug not in implemented() or Path(slug).is_dir():
        return None
    pruner = make_method(slug, **parse_assignments([part for part in settings.split(",") if part]))
    if isinstance(pruner, Stack) or pruner.phase != "weights":
        raise BadInput(f"a draft model is made by a weight method; {slug} prunes no weights")
    return pruner


def _apply(job: Job, pruner: Method, loaded: LoadedModel, what: str, **calibration: Any) -> Applied:
    job.progress(what, 0, 0)
    return pruner.apply(
        loaded,
        samples=job.request.calibration_windows,
        length=_window(loaded),
        seed=job.request.seed,
        progress=lambda done, total: job.progress(what, done, total),
        **calibration,
    )


def _window(loaded: LoadedModel) -> int:
    """Tokens of a calibration window."""
    return min(CALIBRATION_LENGTH, context(loaded))
