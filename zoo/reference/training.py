"""Training the reference VLM: words, answers, and a last stretch in which the learning rate falls to zero.

The answers are learnt at a constant rate for as long as there is time; what is then reached settles in a few more
steps. A training may so be stopped at any step and still give its best: ``finish`` goes straight to the last stretch.
Every stretch has its own folder with log and checkpoint, so a training that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import safe_open

from zoo.bench.environment import environment
from zoo.engines.lora import Adapters
from zoo.engines.training import CHECKPOINT, Recipe, Step, Task, fit
from zoo.errors import BadInput
from zoo.reference import assembly
from zoo.reference.lessons import Canvases, answers_lesson, words_lesson

WORDS = Recipe(steps=1000, batch=32, learning_rate=2e-3, warmup=10, schedule="cosine", checkpoint_every=20)
ANSWERS = Recipe(
    steps=100_000,
    batch=4,
    learning_rate=1e-3,
    warmup=10,
    schedule="constant",
    precision="bfloat16",
    checkpoint_every=10,
)
SETTLING = ANSWERS.model_copy(update={"steps": 150, "learning_rate": 7e-4, "warmup": 2, "schedule": "linear"})
CANVASES = 1_000_000
"""Canvases that each lesson draws from, other ones for each: more than any training sees."""
TRAINED, RECORD, LATEST = "reference-vlm.safetensors", "reference-vlm.json", "answers"
STRETCHES = ("words", LATEST, "settling")


class Stretch(BaseModel):
    """One part of a training."""

    recipe: dict[str, Any]
    steps: int
    canvases: int
    terms: int = Field(description="Patches or answer tokens learnt from.")
    unit: str
    first_loss: float = Field(description="Mean over the first tenth of the steps.")
    last_loss: float = Field(description="Mean over the last tenth of the steps.")
    seconds: float = Field(description="Wall clock, of all sessions together.")


class Record(BaseModel):
    """How the trained part came about, kept beside it."""

    parts: dict[str, str] = Field(description="Revision of the models that it belongs to, by name.")
    feature_layer: int
    rank: int
    seed: int
    stretches: dict[str, Stretch]
    finished: str
    environment: dict[str, Any]
    remarks: str = Field("", description="Where this training was not what the command alone does.")


@dataclass(frozen=True)
class Recipes:
    """How each stretch is trained."""

    words: Recipe = WORDS
    answers: Recipe = ANSWERS
    settling: Recipe = SETTLING


def train(
    output: str | Path,
    *,
    recipes: Recipes | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    finish: bool = False,
    on_step: Callable[[str, Step], None] | None = None,
) -> Record:
    """Train the small part of the reference VLM.

    Args:
        output: a folder; the trained part will be ``reference-vlm.safetensors`` in it, its record beside it, and the
            log and checkpoint of each stretch in a folder of its own.
        recipes: how.
        seed: of everything random.
        device: as in ``load_model``.
        resume: go on with the training in ``output``.
        finish: of the answers, take what the last checkpoint holds, and settle.
        on_step: called after each step with the name of the stretch.

    Raises:
        BadInput: ``output`` holds a training already, or none to finish.
        NeedsExtra: peft is not installed.
        RunFailed: a loss that is not finite, a full disk ... The last checkpoint stays.
        TrainingInterrupted: Ctrl-C; the finished steps are in the checkpoint.
    """
    recipes = recipes or Recipes()
    folder = Path(output).expanduser().absolute()
    if (folder / TRAINED).exists():
        raise BadInput(f"the training in {folder} is finished; name another folder")
    if not resume and any((folder / name / CHECKPOINT).exists() for name in STRETCHES):
        raise BadInput(f"{folder} holds an unfinished training: add --resume, or name another folder")
    if finish and not (folder / LATEST / CHECKPOINT).exists():
        raise BadInput(f"{folder} holds no training of answers that could be finished")
    encoder, language = assembly.parts()
    origins = {part.ref: str(part.revision) for part in (encoder, language)}
    model, processor = assembly.assemble(encoder, language, seed)
    model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    done = {}

    def run(name: str, task: Task, recipe: Recipe) -> None:
        seeded = recipe.model_copy(update={"seed": seed})
        tell = None if on_step is None else lambda step: on_step(name, step)
        history = fit(task, seeded, folder / name, resume=resume, progress=tell)
        done[name] = _stretch(history, seeded)

    run("words", words_lesson(model, processor, Canvases(CANVASES)), recipes.words)
    model.model.language_model.to(torch.bfloat16)  # frozen, and the adapters are float32 all the same
    decoder = assembly.language_parts(model)
    adapters = Adapters(
        model,
        decoder,
        [assembly.RANK] * len(decoder.layers),
        alpha_per_rank=assembly.ALPHA_PER_RANK,
        seed=seed,
    )
    answers = answers_lesson(model, processor, Canvases(CANVASES, CANVASES), adapters.parameters)
    if finish:
        done[LATEST] = _take(answers, folder / LATEST, recipes.answers)
    else:
        run(LATEST, answers, recipes.answers)
    settling = answers_lesson(model, processor, Canvases(CANVASES, 2 * CANVASES), adapters.parameters)
    run("settling", settling, recipes.settling)
    record = Record(
        parts=origins,
        feature_layer=assembly.FEATURE_LAYER,
        rank=assembly.RANK,
        seed=seed,
        stretches=done,
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(str(model.device), model.config._attn_implementation),
    )
    assembly.save_trained(assembly.trained_tensors(model, adapters.parameters), folder / TRAINED)
    (folder / RECORD).write_text(f"{record.model_dump_json(indent=2)}\n", encoding="utf-8")
    return record


def _take(task: Task, folder: Path, recipe: Recipe) -> Stretch:
    """Put what a checkpoint holds into the parameters of ``task``, at whatever step it was made."""
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        steps = int(file.metadata()["step"])
        for name, parameter in task.parameters().items():
            parameter.data.copy_(file.get_tensor(f"parameter/{name}"))
    lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()[:steps]
    return _stretch([Step(**json.loads(line)) for line in lines], recipe)


def _stretch(history: Sequence[Step], recipe: Recipe) -> Stretch:
    tenth = max(1, len(history) // 10)
    return Stretch(
        recipe=recipe.model_dump(mode="json", exclude={"checkpoint_every"}),
        steps=len(history),
        canvases=len(history) * recipe.batch * recipe.accumulate,
        terms=sum(step.terms for step in history),
        unit=history[0].unit,
        first_loss=sum(step.loss for step in history[:tenth]) / tenth,
        last_loss=sum(step.loss for step in history[-tenth:]) / tenth,
        seconds=round(sum(step.seconds for step in history), 1),
    )
