"""The beginning of a run: the models are loaded, the methods look at them, and the record is begun."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timezone
from typing import Any

from zoo.bench.environment import environment
from zoo.bench.record import PROTOCOL, ModelFacts, RunRecord
from zoo.models import LoadedModel, loading
from zoo.runner.commands import command_line
from zoo.runner.kinds import DEFAULT_MODELS
from zoo.runner.pruning import Draft, draft_pruner
from zoo.runner.request import Job


def load_target(job: Job, model: str | LoadedModel | None) -> LoadedModel:
    """The model that is measured, which the methods have agreed to.

    Raises:
        BadInput: there is no such model, or a method does not suit it.
    """
    if model is None:
        model = DEFAULT_MODELS[job.kind]
    if isinstance(model, str):
        job.progress(f"loading {model}", 0, 0)
        model = loading.load_model(model, device=job.request.device, dtype=job.request.dtype)
    job.method.check(model)
    return model


def load_draft(job: Job, target: LoadedModel) -> Draft:
    """The draft model that is asked for, or the weight method that is to make it out of the target.

    Raises:
        BadInput: there is no such model, or no such method of that kind.
    """
    ref = job.request.draft
    if ref is None:
        return None
    pruner = draft_pruner(ref)
    if pruner is not None:
        return pruner
    job.progress(f"loading {ref}", 0, 0)
    return loading.load_model(ref, device=str(target.device), dtype=target.dtype)


def begin_record(job: Job, loaded: LoadedModel) -> RunRecord:
    """A record without figures: who runs on what, where, and how to repeat it."""
    config = loaded.model.config
    device = str(loaded.device)
    record = RunRecord(
        key=uuid.uuid4().hex,
        protocol=PROTOCOL,
        method=job.method.name,
        parameters=job.method.parameters(),
        model=ModelFacts(
            ref=loaded.ref,
            revision=loaded.revision,
            architecture=config.model_type,
            facts={name: value for name, value in loaded.facts.items() if _is_json(value)},
        ),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=device,
        dtype=str(loaded.dtype).removeprefix("torch."),
        seed=job.request.seed,
        environment=environment(device, getattr(config, "_attn_implementation", None)),
        command=command_line(job.method.name, loaded.ref, job.request, job.settings) if job.methods else "",
    )
    caveat = loaded.facts.get("caveat")
    if caveat:
        record.notes.append(str(caveat))
    return record


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
