"""``zoo train``: methods with something to learn, from data to a saved model.

::

    trained = zoo.train("cfsp", "smollm2-135m", "alpaca.jsonl", output="small", parameters={"sparsity": 0.3})
    print(trained.record.after["held-out perplexity"])
    zoo.load_model("small/model")

A trainable method prepares a ``Lesson`` from a model and data: a task for the training loop (``zoo.engines.training``),
and what is to be made of the outcome. This module does what is the same for all: what can be refused early, reading and
splitting the data, the folder with log and checkpoint, resuming, the record, saving.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, Field, ValidationError

from zoo.errors import BadInput, BadParameter, RunFailed
from zoo.interface import Method, implemented, method_class
from zoo.interface import method as make_method
from zoo.runner import CALIBRATION_WINDOWS, DEFAULT_MODELS, kind_of

if TYPE_CHECKING:
    from zoo.engines.training import Recipe, Step, Task
    from zoo.models import LoadedModel

SETTINGS, RECORD, MODEL = "settings.json", "record.json", "model"
HELD_OUT = 0.1
"""Fraction of the examples that is kept for measuring."""

Progress = Callable[[str, int, int], None]
"""Called with what is going on, finished and total steps of it (0: unknown)."""


class Outcome(Protocol):
    """What a training leaves."""

    def save(self, folder: str | Path) -> Path:
        """Write it to a new folder, all or nothing."""


@dataclass(frozen=True)
class Lesson:
    """What a method makes of a model and data.

    Attributes:
        task: what learns, and from what.
        finish: called once after the training; gives what is saved.
        measure: figures on held-out data by readable name; called before and after the training.
    """

    task: Task
    finish: Callable[[], Outcome]
    measure: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """Circumstances of a training.

    Attributes:
        folder: where a method may keep what is expensive to make again when the training is resumed.
        seed: of everything random.
        length: tokens per example of text; longer ones are cut.
        calibration: texts for methods that prune first; ``None`` for the packaged ones.
        windows: how many windows of 128 tokens are drawn from them.
        progress: to be called as the preparation goes on.
        recipe: how it will learn; ``None`` when only the preparation is wanted.
    """

    folder: Path
    seed: int
    length: int
    calibration: Sequence[str] | None
    windows: int
    progress: Progress
    recipe: Recipe | None = None


class Trainable(ABC):
    """Mixin of methods with something to train."""

    recipe: ClassVar[Recipe]
    """The paper's, as far as it states one."""
    data: ClassVar[str] = "news"
    """What to learn from when nothing is named."""

    @classmethod
    def read(cls, ref: str | Path) -> Sequence[Any]:
        """Examples from the data that a user names: dialogues, unless overridden.

        Raises:
            BadInput: there is no such data, or they have another form.
        """
        from zoo.dialogues import load_dialogues

        return load_dialogues(ref)

    def check_training(self, loaded: LoadedModel) -> None:
        """Refuse models that cannot be trained: those that the method cannot run on, unless overridden."""
        assert isinstance(self, Method)
        self.check(loaded)

    @abstractmethod
    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Get everything ready to learn. Called again, with the same arguments, when a training is resumed.

        Args:
            loaded: the model, which may not be changed.
            examples: to learn from, as from ``read``.
            heldout: to measure on.
            setting: seed, folder ...
        """


class TrainingRecord(BaseModel):
    """What was done, kept as ``record.json`` beside the model."""

    method: str
    parameters: dict[str, Any]
    model: str
    revision: str | None
    data: str
    examples: int
    heldout: int
    length: int = Field(description="Tokens per example of text, at most.")
    calibration_windows: int = Field(
        description="Drawn from the calibration text, by methods that prune first."
    )
    recipe: dict[str, Any]
    steps: int
    terms: int = Field(description="Tokens, pictures ... learnt from, repetitions counted.")
    unit: str
    first_loss: float = Field(description="Mean over the first tenth of the steps.")
    last_loss: float = Field(description="Mean over the last tenth of the steps.")
    before: dict[str, float] = Field(description="Figures on held-out data before the training.")
    after: dict[str, float]
    seconds: float = Field(description="Time spent in training steps, of all sessions together.")
    finished: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A finished training: ``outcome`` is in memory, a copy of it at ``folder``."""

    record: TrainingRecord
    outcome: Any
    folder: Path


def train(
    spec: str | Method,
    model: str | LoadedModel | None = None,
    data: str | Path | Sequence[Any] | None = None,
    *,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    length: int = 256,
    calibration: Sequence[str] | None = None,
    calibration_windows: int = CALIBRATION_WINDOWS,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Trained:
    """Train what a method has to train, and save it.

    Args:
        spec: a method or its slug.
        model: reference or loaded model, which is not changed; ``None`` for the default of the method's family.
        data: packaged name or file (see the method's ``read``), or examples; ``None`` for the method's default.
        output: a new folder. ``model`` in it is the result, ``record.json`` says how it came about,
            ``training.jsonl`` has a line per step. ``checkpoint.safetensors`` is there until the end.
        parameters: of the method.
        recipe: fields of ``zoo.engines.training.Recipe`` that replace the method's own.
        length: tokens per example of text.
        calibration: texts for methods that prune first; ``None`` for the packaged ones.
        calibration_windows: how many windows of 128 tokens are drawn from them.
        seed: of everything random.
        device, dtype: as in ``load_model``.
        resume: go on with an unfinished training in ``output``, whose settings must be the same.
        progress: called as the preparation goes on.
        on_step: called after each training step.

    Raises:
        BadInput: (and its kinds) what is asked for cannot be.
        RunFailed: a loss that is not finite, a full disk ... The last checkpoint stays.
        TrainingInterrupted: Ctrl-C; the finished steps are in the checkpoint.
    """
    method = make_method(spec, **(parameters or {})) if isinstance(spec, str) else spec
    if not isinstance(method, Method) or not isinstance(method, Trainable):
        raise BadInput(f"{method.name} has nothing to train; zoo train works with {', '.join(trainable())}")
    whole_recipe = _recipe(method, {**(recipe or {}), "seed": seed})
    folder = Path(output).expanduser().absolute()
    _check_output(folder, resume)
    ref = method.data if data is None else data
    everything = method.read(ref) if isinstance(ref, (str, Path)) else ref
    examples, heldout = split(everything, seed)

    from zoo.engines.training import CHECKPOINT, fit
    from zoo.models.loading import load_model
    from zoo.models.quiet import quiet_transformers

    progress = progress or (lambda *_: None)
    if model is None:
        model = DEFAULT_MODELS[kind_of([method], None)]
    if isinstance(model, str):
        progress(f"loading {model}", 0, 0)
        model = load_model(model, device=device, dtype=dtype)
    method.check_training(model)
    origin = {
        "method": method.slug,
        "parameters": method.parameters(),
        "model": model.ref,
        "revision": model.revision,
        "data": str(ref) if isinstance(ref, (str, Path)) else "in memory",
        "examples": len(examples),
        "heldout": len(heldout),
        "length": length,
        "calibration_windows": calibration_windows,
        "recipe": whole_recipe.model_dump(mode="json", exclude={"checkpoint_every"}),
    }
    _keep_settings(folder, origin)
    with quiet_transformers():
        try:
            setting = Setting(folder, seed, length, calibration, calibration_windows, progress, whole_recipe)
            lesson = method.prepare(model, examples, heldout, setting)
        except BadInput:
            _leave_no_empty(folder)
            raise
        progress("measuring on held-out data", 0, 0)
        before = lesson.measure()
        history = fit(lesson.task, whole_recipe, folder, resume=resume, progress=on_step)
        outcome = lesson.finish()
        progress("measuring on held-out data", 0, 0)
        record = _record(origin, model, history, before, lesson.measure())
        saved = outcome.save(folder / MODEL)
    _write(folder / RECORD, record.model_dump_json(indent=2))
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return Trained(record, outcome, saved)


def _record(
    origin: Mapping[str, Any],
    model: LoadedModel,
    history: Sequence[Step],
    before: dict[str, float],
    after: dict[str, float],
) -> TrainingRecord:
    from zoo.bench.environment import environment

    tenth = max(1, len(history) // 10)
    return TrainingRecord(
        **origin,
        steps=len(history),
        terms=sum(step.terms for step in history),
        unit=history[0].unit,
        first_loss=sum(step.loss for step in history[:tenth]) / tenth,
        last_loss=sum(step.loss for step in history[-tenth:]) / tenth,
        before=before,
        after=after,
        seconds=round(sum(step.seconds for step in history), 3),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(str(model.device), getattr(model.model.config, "_attn_implementation", None)),
    )


def trainable() -> list[str]:
    """Slugs of all methods with something to train. Imports every method."""
    return [slug for slug in implemented() if issubclass(method_class(slug), Trainable)]


def split(examples: Sequence[Any], seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Part off a tenth of the examples for measuring, at least one; which ones depends on the seed.

    Raises:
        BadInput: fewer than two examples.
    """
    if len(examples) < 2:
        raise BadInput(
            f"training needs two examples or more, one of them to measure on; given: {len(examples)}"
        )
    places = list(range(len(examples)))
    random.Random(seed).shuffle(places)  # noqa: S311 - not for secrets
    count = max(1, round(HELD_OUT * len(examples)))
    return Part(examples, sorted(places[count:])), Part(examples, sorted(places[:count]))


class Part(Sequence[Any]):
    """Some places of a sequence. Items are read when they are asked for: pictures stay on disk until then."""

    def __init__(self, whole: Sequence[Any], places: Sequence[int]) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Part(self._whole, self._places[place])
        return self._whole[self._places[place]]


def _recipe(method: Trainable, changes: Mapping[str, Any]) -> Recipe:
    own = method.recipe
    try:
        return type(own).model_validate({**own.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            fields = ", ".join(type(own).model_fields)
            raise BadParameter(f"a recipe has no field '{name}'; it has {fields}") from None
        raise BadParameter(f"recipe: {name}: {first['msg']} (given: {first['input']!r})") from None


def _check_output(folder: Path, resume: bool) -> None:
    """Raise ``BadInput`` unless a training may begin, or go on, in ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; name a folder for the training")
    if (folder / MODEL).exists():
        raise BadInput(f"the training in {folder} is finished; name another folder")
    if resume or not folder.exists() or not any(folder.iterdir()):
        return
    if (folder / SETTINGS).exists():
        raise BadInput(f"{folder} holds an unfinished training: add --resume, or name another folder")
    raise BadInput(f"{folder} is not empty; name a new folder for the training")


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a training down when it begins, and compare them when it goes on."""
    path = folder / SETTINGS
    if not path.exists():
        _write(path, json.dumps(settings, indent=2))
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); train into a new folder") from None
    now = json.loads(json.dumps(settings))
    for name in settings:
        if before.get(name) != now[name]:
            raise BadInput(
                f"the training in {folder} has {name} = {before.get(name)}, not {now[name]}: resume it with the same "
                "settings, or train into a new folder"
            )


def _leave_no_empty(folder: Path) -> None:
    """Remove the settings of a training that was refused before it had kept anything."""
    if [path.name for path in folder.iterdir()] == [SETTINGS]:
        (folder / SETTINGS).unlink()
        folder.rmdir()


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise RunFailed(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from None
