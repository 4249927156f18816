"""A run from beginning to end.

What can be refused without loading the model is refused first: unknown methods, wrong parameters, missing files,
targets that cannot be written.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo.bench.record import RunRecord
from zoo.bench.settings import Settings
from zoo.errors import BadInput, RunFailed
from zoo.interface import Method, Stack
from zoo.interface import method as make_method
from zoo.runner.checks import check_request, needs_draft
from zoo.runner.kinds import kind_of, usual_draft
from zoo.runner.request import Job, Request
from zoo.runner.storing import finish

if TYPE_CHECKING:
    from zoo.bench.scenarios.decoding import Watch
    from zoo.bench.session import Progress
    from zoo.bench.tasks import Kept
    from zoo.models import LoadedModel


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``record`` holds what was finished, and is stored already."""

    def __init__(self, record: RunRecord) -> None:
        super().__init__()
        self.record = record


def run(
    spec: str | Method | Stack,
    model: str | LoadedModel | None = None,
    request: Request | None = None,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    kept: Kept | None = None,
    **more: Any,
) -> RunRecord:
    """Apply a method to a model and measure both side by side.

    Args:
        spec: a method, a slug, or slugs joined by ``+``; ``Stack([])`` puts a task to the unmodified model alone.
        model: reference or loaded model; ``None`` = the default of the method's family.
        request: prompt, pictures, calibration, seed, targets ...
        settings: how much to measure.
        progress: called as the work goes on.
        watch: follows one generation of a decoding method, see ``zoo.live.LiveText.follow``.
        kept: what an earlier run on the same ``model`` object left for this one, see ``zoo.bench.tasks.Kept``.
        more: fields of ``Request`` by name, as ``parameters={"sparsity": 0.3}``.

    Returns:
        The record. It is stored in the user's catalogue unless ``store=False``.

    Raises:
        BadInput: (and its kinds) what is asked for cannot be; nothing has been done.
        RunFailed: the work itself failed.
        RunInterrupted: Ctrl-C; carries the record of what was finished.
    """
    if request is None:
        request = Request(**more)
    elif more:
        raise TypeError("give either a Request or its fields, not both")
    method = make_method(spec, **request.parameters) if isinstance(spec, str) else spec
    methods = method.methods if isinstance(method, Stack) else [method]
    if model is None:
        model = next((method.default_model for method in methods if method.default_model), None)
    if request.draft is None and any(needs_draft(method) for method in methods):
        request = replace(request, draft=usual_draft(model))
    job = Job(
        method,
        kind_of(methods, model),
        request,
        settings or Settings(),
        progress or (lambda *_: None),
        watch,
        kept,
    )
    check_request(job)

    # Torch is imported from here on: the refusals above are instant.
    from zoo.bench.session import Session
    from zoo.runner.measuring import measure
    from zoo.runner.opening import begin_record, load_draft, load_target

    loaded = load_target(job, model)
    draft = load_draft(job, loaded)
    record = begin_record(job, loaded)
    session = Session(record, job.settings, loaded.device, job.progress)
    begun = time.perf_counter()
    try:
        measure(job, session, loaded, draft)
    except KeyboardInterrupt:
        record.status = "interrupted"
        finish(job, record, begun)
        raise RunInterrupted(record) from None
    except BadInput:
        raise
    except Exception as error:
        failure = _in_one_line(error)
        record.status, record.error = "failed", str(failure)
        finish(job, record, begun)
        if failure is error:
            raise
        raise failure from None
    finish(job, record, begun)
    return record


def _in_one_line(error: Exception) -> Exception:
    """What a full machine says, as a sentence; anything else is a bug and stays what it is."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RunFailed(
            "the machine ran out of memory; use a smaller model, --dtype bfloat16 or shorter inputs"
        )
    return error
