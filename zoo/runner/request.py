"""What is asked of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.bench.settings import Settings
from zoo.interface import Method, Stack
from zoo.runner.kinds import Kind

if TYPE_CHECKING:
    from zoo.bench.scenarios.decoding import Watch
    from zoo.bench.session import Progress
    from zoo.bench.tasks import Kept, Task

CALIBRATION_WINDOWS = 32
CALIBRATION_LENGTH = 128

DRAWN = frozenset({"visual-tokens", "encoder-tokens"})
"""Phases of methods whose effect on a picture can be drawn."""


@dataclass(frozen=True)
class Request:
    """Everything that is asked of a run besides method and model.

    Attributes:
        parameters: the method's hyper-parameters, as given.
        prompt: text for generation; ``None`` = a default of the family.
        raw: feed the prompt as it is, without the model's chat template.
        images: picture files, or names of packaged pictures.
        video: a video file, or a folder of frames, for vision-language models.
        frames: how many frames are taken of it.
        calibration: text for weight methods, as for ``load_texts``: a file, or ``hub:owner/name`` for a dataset;
            ``None`` = packaged news.
        calibration_windows: windows of ``CALIBRATION_LENGTH`` tokens drawn from it.
        draft: draft model of decoders that need one: a reference, or ``METHOD:name=value,...`` for a copy of the target
            pruned with that weight method. ``None`` = the one that ``zoo.models.names`` knows for the target, if any.
        device, dtype: as in ``load_model``; ``None`` = its defaults.
        seed: of calibration windows and of everything random.
        save: folder for the pruned model; must not exist, or be empty.
        report: folder for ``report.html`` and ``record.json``; for token methods also ``overlay.png``.
        overlay: PNG file for a picture of the tokens that stay.
        task: what both sides are asked; ``None`` = what suits the family: speed, memory and quality, side by side.
        store: keep the record in the user's catalogue.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    raw: bool = False
    images: Sequence[str] = ()
    video: Path | None = None
    frames: int | None = None
    calibration: str | Path | None = None
    calibration_windows: int = CALIBRATION_WINDOWS
    draft: str | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    save: Path | None = None
    report: Path | None = None
    overlay: Path | None = None
    task: Task | None = None
    store: bool = True


@dataclass(frozen=True)
class Job:
    """One run as its parts see it: the method, what is asked, and how much to measure.

    Attributes:
        method: one, or a stack.
        kind: of the model that it runs on.
        request: what is asked.
        settings: how much to measure.
        progress: called as the work goes on.
        watch: follows one generation of a decoding method.
        kept: what an earlier run on the same model left for this one.
    """

    method: Method | Stack
    kind: Kind
    request: Request
    settings: Settings
    progress: Progress
    watch: Watch | None = None
    kept: Kept | None = None

    @property
    def methods(self) -> list[Method]:
        """The methods of the stack, in its order."""
        return self.method.methods if isinstance(self.method, Stack) else [self.method]

    @property
    def phases(self) -> set[str]:
        """Where they act."""
        return {method.phase for method in self.methods}

    @property
    def pruner(self) -> Method | None:
        """The method that changes weights."""
        return next((method for method in self.methods if method.phase == "weights"), None)

    @property
    def reversible(self) -> list[Method]:
        """The methods that change how a model runs, not its weights."""
        return [method for method in self.methods if method.phase != "weights"]
