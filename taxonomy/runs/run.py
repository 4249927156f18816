"""A run as it is stored: a method on a model, the environment, and the figures that were measured."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from taxonomy.errors import CatalogError

Arm = Literal["dense", "method", "ratio"]
Status = Literal["done", "failed", "refused", "interrupted"]

_ARMS = ("dense", "method", "ratio")
_STATUSES = ("done", "failed", "refused", "interrupted")
IMPORTED = "imported"
"""Key of ``Run.environment`` that says which file a run of somebody else came from."""
TRIAL = "trial"
"""Key of ``Run.inputs`` for a digest of everything that was asked for but the task."""

_STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")


@dataclass(frozen=True)
class Measurement:
    """One measured figure of a run.

    Attributes:
        quantity: what was measured, as ``prefill``, ``decode_rate``, ``peak_memory``, ``perplexity``.
        arm: ``dense`` (the unmodified model), ``method``, or ``ratio`` of the two.
        unit: ``s``, ``tokens/s``, ``bytes``, ``1`` ...
        median: median of the repeats, or the one value.
        spread: half the distance between the quartiles; ``None`` for a single value.
        n: number of repeats.
        task: data set or ability; empty when it does not apply.
    """

    quantity: str
    arm: Arm
    unit: str
    median: float
    spread: float | None = None
    n: int = 1
    task: str = ""


@dataclass(frozen=True)
class Run:
    """One run of a method (or of a stack) on a model, with everything needed to trust it.

    Attributes:
        method: slug, or several joined by ``+``; ``dense`` for the unmodified model alone.
        model: reference the model was loaded from.
        started: UTC, ISO 8601, as ``2026-05-04T10:11:12+00:00`` or with ``Z``.
        seconds: wall time of the whole run.
        environment: ``hardware`` (required: one readable line) and versions, commit, threads, operating system ...
            Equal environments are stored once.
        parameters: hyper-parameters as JSON values (``Method.parameters()``).
        model_revision: commit or digest of the weights; empty when unknown.
        model_facts: parameters, architecture ... of the model.
        inputs: what the model was fed: prompt, image, calibration, lengths.
        status: ``done``, ``failed``, ``refused`` or ``interrupted``; ``error`` says why.
        protocol: version of the measuring protocol.
        report: ``zoo.report.Report`` as JSON values.
        key: identifies the run everywhere; recording the same key twice stores it once.
    """

    method: str
    model: str
    started: str
    seconds: float
    environment: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    model_revision: str = ""
    model_facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None
    status: Status = "done"
    error: str | None = None
    protocol: str = "1"
    report: Mapping[str, Any] | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def methods(self) -> tuple[str, ...]:
        """The slugs of a stack, in its order."""
        return tuple(dict.fromkeys(part.strip() for part in self.method.split("+")))

    @property
    def config(self) -> str:
        """Digest of what was asked for: equal for runs that only differ in when and where they ran."""
        asked = [self.method, self.parameters, self.model, self.model_revision, self.inputs]
        return digest([*asked, self.seed, self.dtype, self.device, self.protocol])

    @property
    def trial(self) -> str | None:
        """Equal for runs that asked a method at one setting different tasks, as the cells of a plan do."""
        return self.inputs.get(TRIAL)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; ``from_json`` reads it back. One line of ``taxonomy/measurements/*.jsonl``."""
        return {**vars(self), "measurements": tuple(dict(vars(figure)) for figure in self.measurements)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str = "run") -> Run:
        """Read a run written by ``to_json``.

        Raises:
            CatalogError: a field is missing, unknown or wrong; the sentence begins with ``where``.
        """
        values = dict(row)
        if "key" not in values:  # a fresh key per reading would store the same line again and again
            raise CatalogError(f"{where}: 'key' is missing")
        try:
            measured = [Measurement(**measurement) for measurement in values.pop("measurements", ())]
            run = cls(measurements=tuple(measured), **values)
        except TypeError as error:
            reason = str(error).partition("__init__() ")[2] or str(error)
            raise CatalogError(f"{where}: {reason}") from None
        check_run(run, where)
        return run


def check_run(run: Run, where: str = "run") -> None:
    """Raise ``CatalogError`` when a field of ``run`` cannot be stored."""

    def refuse(reason: str) -> CatalogError:
        return CatalogError(f"{where}: {reason}")

    if not run.method or not all(run.methods):
        raise refuse("'method' must be a slug, or slugs joined by +")
    if run.status not in _STATUSES:
        raise refuse(f"status '{run.status}' is none of {', '.join(_STATUSES)}")
    if not _STARTED.fullmatch(run.started):
        raise refuse(f"'started' must be UTC in ISO 8601, as 2026-05-04T10:11:12Z, not '{run.started}'")
    if not isinstance(run.environment.get("hardware"), str):
        raise refuse("'environment' must have a text 'hardware'")
    seen = set()
    for row in run.measurements:
        place = (row.task, row.quantity, row.arm)
        if row.arm not in _ARMS:
            raise refuse(f"arm '{row.arm}' of {row.quantity} is none of {', '.join(_ARMS)}")
        if row.n < 1:
            raise refuse(f"{row.quantity} ({row.arm}) has n = {row.n}; at least one repeat is needed")
        if place in seen:
            raise refuse(
                f"{row.quantity} ({row.arm}) is measured twice{' on ' + row.task if row.task else ''}"
            )
        seen.add(place)
    try:
        canonical_json(run.to_json())
    except (TypeError, ValueError) as error:
        raise refuse(f"not storable as JSON: {error}") from None


def digest(value: Any) -> str:
    """32 hexadecimal digits that depend on the JSON ``value`` alone, not on the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys: equal values, equal text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
