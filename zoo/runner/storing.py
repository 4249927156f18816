"""The end of a run: the record is completed, stored in the user's catalogue, and written as a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from taxonomy.errors import TaxonomyError
from zoo.bench.record import RunRecord
from zoo.runner.request import Job


def finish(job: Job, record: RunRecord, begun: float) -> None:
    """Complete the record, store the run, write the report. A catalogue that refuses costs no figures.

    Args:
        job: what was asked.
        record: of the run.
        begun: when measuring began, on ``time.perf_counter``.
    """
    record.seconds = round(time.perf_counter() - begun, 3)
    record.inputs["settings"] = vars(job.settings).copy()
    if job.request.store:
        from taxonomy.runs import record_run

        try:
            record_run(stored_form(record))
        except TaxonomyError as error:
            record.notes.append(f"This run could not be stored in the catalogue: {error}")
    if job.request.report is not None:
        from zoo.html_report import write_report

        overlay = record.inputs.get("overlay")
        write_report(record, job.request.report, Path(overlay) if overlay else None)


def stored_form(record: RunRecord) -> dict[str, Any]:
    """The record as ``taxonomy.runs.record_run`` takes it."""
    body = record.model_dump(mode="json")
    reports = body["reports"]
    report = reports[0] if len(reports) == 1 else {"reports": reports} if reports else {}
    outcomes = _outcomes(record)
    if outcomes:
        report = {**report, "outcomes": outcomes}
    return {
        **{
            name: body[name]
            for name in (
                "key", "method", "started", "seconds", "environment", "parameters",
                "inputs", "seed", "dtype", "device", "status", "error", "protocol",
            )
        },
        "model": record.model.ref,
        "model_revision": record.model.revision or "",
        "model_facts": {"architecture": record.model.architecture, **record.model.facts},
        "report": report or None,
        "measurements": list(record.measurements()),
    }  # fmt: skip


def _outcomes(record: RunRecord) -> dict[str, dict[str, str]]:
    """Right and wrong per question, by quantity and task, and by arm; what paired intervals are computed from."""
    found: dict[str, dict[str, str]] = {}
    for row in record.comparisons:
        for arm, figure in (("dense", row.dense), ("method", row.method)):
            if figure is not None and figure.items is not None:
                found.setdefault(f"{row.quantity}: {row.task}", {})[arm] = figure.items
    return found
