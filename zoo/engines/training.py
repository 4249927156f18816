"""Training: one loop for everything that learns.

A method says what learns, from which examples, and what the loss of a batch is: a ``Task``. A ``Recipe`` says how. The
loop owns the optimiser (AdamW), the learning rate, the order of the examples, accumulation, clipping, the log and the
checkpoints.

A step depends on those before it through the parameters and the optimiser's moments only: the learning rate is a
function of the step, the order of the examples one of the seed and the epoch, and every step seeds the random numbers
that it draws. A checkpoint is therefore nothing but tensors and a number, in one safetensors file, and a training that
was interrupted and resumed ends with the same bits as one that ran through (on hardware whose kernels are
deterministic, as the CPU's are).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from zoo.errors import BadInput, RunFailed

CHECKPOINT, LOG = "checkpoint.safetensors", "training.jsonl"
STABLE_DECAY = 0.2
"""Fraction of a stable-decay schedule in which the learning rate falls."""


class Recipe(BaseModel):
    """How to train. Methods bring their paper's; everything can be overridden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int | None = Field(None, ge=1, description="Optimiser steps; replaces epochs.")
    epochs: float = Field(1.0, gt=0, description="Passes over the examples.")
    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate.")
    batch: int = Field(8, ge=1, description="Examples per forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes per optimiser step.")
    warmup: float = Field(0, ge=0, description="Steps of linear warm-up; below 1: a fraction of all steps.")
    schedule: Literal["constant", "linear", "cosine", "stable-decay"] = Field(
        "cosine",
        description="How the learning rate falls after the warm-up; stable-decay: linearly in the last fifth.",
    )
    power: float = Field(1.0, gt=0, description="Exponent of the linear schedule ('poly' when not 1).")
    final: float = Field(0, ge=0, le=1, description="Learning rate at the end, as a fraction of the highest.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay of AdamW's two moments.")
    weight_decay: float = Field(
        0, ge=0, description="Decoupled weight decay, where a group has none of its own."
    )
    clip: float | None = Field(1.0, gt=0, description="Bound on the gradient; none when null.")
    clip_by: Literal["norm", "value"] = Field("norm", description="Bound its norm, or every entry.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type to compute in. Parameters that learn are float32 always."
    )
    seed: int = Field(0, ge=0, description="Of the order of examples and of all random numbers.")
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")

    def total_steps(self, examples: int) -> int:
        """Optimiser steps on that many examples."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * examples / (self.batch * self.accumulate)))

    def rate_at(self, step: int, steps: int) -> float:
        """Factor on the learning rate in step ``step`` (from 0) of ``steps``, in ``[0, 1]``.

        The warm-up rises linearly and reaches 1 with its last step; the fall begins after it.
        """
        warmup = math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / warmup
        passed = (step - warmup) / max(1, steps - warmup)
        shapes = {
            "constant": 1.0,
            "linear": (1 - passed) ** self.power,
            "cosine": (1 + math.cos(math.pi * passed)) / 2,
            "stable-decay": min(1.0, (1 - passed) / STABLE_DECAY),
        }
        return self.final + (1 - self.final) * shapes[self.schedule]


@dataclass(frozen=True)
class Loss:
    """Loss of one batch.

    Attributes:
        total: 0-d tensor, the *sum* over ``terms``. Sums, not means, so that accumulated batches of different sizes
            weigh every term alike.
        terms: what was summed over: predicted tokens, pictures ...
        parts: summands of the loss for the log, 0-d, summed alike.
    """

    total: torch.Tensor
    terms: int
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Parameters that are treated alike, by name (float32).

    Attributes:
        rate: factor on the recipe's learning rate.
        weight_decay: ``None`` for the recipe's.
    """

    parameters: Mapping[str, nn.Parameter]
    rate: float = 1.0
    weight_decay: float | None = None


def groups_by_decay(named: Iterable[tuple[str, nn.Parameter]], rate: float = 1.0) -> list[Group]:
    """The usual two groups: matrices with the recipe's weight decay, vectors (norms, biases, tokens) without."""
    parameters = dict(named)
    matrices = {name: value for name, value in parameters.items() if value.squeeze().dim() > 1}
    vectors = {name: value for name, value in parameters.items() if name not in matrices}
    groups = [Group(matrices, rate), Group(vectors, rate, weight_decay=0.0)]
    return [group for group in groups if group.parameters]


@dataclass(frozen=True)
class Task:
    """What learns, and from what.

    Attributes:
        groups: the parameters that learn. All others of ``module`` are frozen meanwhile. Storage that they share with
            another model is not written to: they get their own.
        examples: a sequence; items are read when their turn comes.
        collate: a list of examples as one batch, on the device of the parameters.
        loss: of a batch in a given step (from 0). May draw random numbers from torch's global generator.
        module: put into training mode meanwhile.
        unit: what the terms of the loss are, for the log.
    """

    groups: Sequence[Group]
    examples: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    loss: Callable[[Any, int], Loss]
    module: nn.Module
    unit: str = "tokens"

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that learns, by name."""
        return {name: value for group in self.groups for name, value in group.parameters.items()}


@dataclass(frozen=True)
class Step:
    """One line of the log. ``loss`` and ``parts`` are means over the ``terms`` of the step."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    terms: int
    unit: str
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """Terms per second."""
        return self.terms / self.seconds if self.seconds else 0.0


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during a training. ``step`` steps are in the checkpoint (0: there is none)."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__()
        self.step, self.steps = step, steps


def fit(
    task: Task,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Train.

    Args:
        task: what learns; its parameters hold the result.
        recipe: how.
        folder: for the log (``training.jsonl``) and the checkpoint (``checkpoint.safetensors``), which is replaced in
            one piece every ``checkpoint_every`` steps, at the end, and on Ctrl-C.
        resume: go on from the checkpoint in ``folder``; from the beginning when there is none.
        progress: called after each step.

    Returns:
        The log, from the first step on.

    Raises:
        BadInput: no examples, half-precision parameters, a checkpoint that is not asked for or was made with another
            recipe or other parameters.
        RunFailed: the loss or its gradient is not finite; the checkpoint could not be written.
        TrainingInterrupted: Ctrl-C. The finished steps are in the checkpoint.
    """
    _check(task)
    for parameter in task.parameters().values():
        parameter.data = parameter.data.clone()  # its storage may be another model's too
    state = _State(task, recipe, folder)
    if resume:
        state.restore()
    elif state.checkpoint.exists():
        raise BadInput(f"{folder} holds an unfinished training: resume it, or name another folder")
    devices = {parameter.device for parameter in task.parameters().values()}
    cuda = [device for device in devices if device.type == "cuda"]
    state.begin_log()
    with torch.random.fork_rng(devices=cuda), _learning(task):
        try:
            while state.done < state.steps:
                step = _advance(state)
                state.log(step)
                state.done, state.updating = step.step, False
                if progress is not None:
                    progress(step)
                if state.done % recipe.checkpoint_every == 0 or state.done == state.steps:
                    state.save()
        except KeyboardInterrupt:
            # In the middle of an update, some parameters are a step ahead: then the last checkpoint stands.
            if not state.updating:
                state.save()
            raise TrainingInterrupted(state.saved, state.steps) from None
    return state.history


def _check(task: Task) -> None:
    if not len(task.examples):
        raise BadInput("there is nothing to train on: the data hold no example")
    given = [parameter for group in task.groups for parameter in group.parameters.values()]
    if len({*map(id, given)}) != len(given) or len(task.parameters()) != len(given):
        raise ValueError("two groups hold the same parameter, or parameters of the same name")
    half = [name for name, value in task.parameters().items() if value.dtype != torch.float32]
    if half:
        raise BadInput(
            f"parameters that learn must be float32, and {half[0]} is not: load the model with dtype float32 "
            "(precision=bfloat16 computes in bfloat16 all the same)"
        )


@contextmanager
def _learning(task: Task) -> Iterator[None]:
    """Gradients for what learns and nothing else, training mode; all as before afterwards."""
    learning = {id(parameter): parameter for parameter in task.parameters().values()}
    everything = learning | {id(parameter): parameter for parameter in task.module.parameters()}
    flags = [(parameter, parameter.requires_grad) for parameter in everything.values()]
    modes = [(module, module.training) for module in task.module.modules()]
    try:
        for key, parameter in everything.items():
            parameter.requires_grad_(key in learning)
        task.module.train()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _advance(state: _State) -> Step:
    """One optimiser step."""
    task, recipe, step = state.task, state.recipe, state.done
    begun = time.perf_counter()
    torch.manual_seed(derived_seed(recipe.seed, step))
    parameters = list(task.parameters().values())
    total, terms, parts = 0.0, 0, dict[str, float]()
    for number in range(recipe.accumulate):
        first = (step * recipe.accumulate + number) * recipe.batch
        chosen = order(len(task.examples), first, recipe.batch, recipe.seed)
        batch = task.collate([task.examples[index] for index in chosen])
        with torch.autocast(
            parameters[0].device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
        ):
            loss = task.loss(batch, step)
        torch.autograd.backward(loss.total)
        total += float(loss.total.detach())
        terms += loss.terms
        for name, value in loss.parts.items():
            parts[name] = parts.get(name, 0.0) + float(value.detach())
    if not terms:
        raise RunFailed(f"step {step + 1} has nothing to predict; check the training data")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        gradient.div_(terms)
    norm = float(nn.utils.get_total_norm(gradients))
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise RunFailed(
            f"the loss of step {step + 1} or its gradient is not finite, so the training stops (checkpoint: step "
            f"{state.saved}); try a lower learning rate, or precision float32"
        )
    if recipe.clip is not None and recipe.clip_by == "norm":
        nn.utils.clip_grads_with_norm_(parameters, recipe.clip, torch.tensor(norm))
    elif recipe.clip is not None:
        nn.utils.clip_grad_value_(parameters, recipe.clip)
    rate = recipe.learning_rate * recipe.rate_at(step, state.steps)
    for group, options in zip(task.groups, state.optimizer.param_groups, strict=True):
        options["lr"] = rate * group.rate
    state.updating = True
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return Step(
        step=step + 1,
        steps=state.steps,
        loss=total / terms,
        learning_rate=rate,
        gradient_norm=norm,
        terms=terms,
        unit=task.unit,
        seconds=time.perf_counter() - begun,
        parts={name: value / terms for name, value in parts.items()},
    )


def derived_seed(*numbers: int) -> int:
    """A seed of 32 bits that depends on all ``numbers`` (torch's CPU generator ignores higher bits)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def order(count: int, first: int, wanted: int, seed: int) -> list[int]:
    """Which of ``count`` examples stand at the places ``first .. first + wanted`` of an endless shuffled sequence.

    Epoch after epoch, every example comes once, in a new order that depends on seed and epoch alone.
    """
    places = (divmod(place, count) for place in range(first, first + wanted))
    return [_permutation(count, seed, epoch)[place] for epoch, place in places]


class _State:
    """A training at some step: optimiser, log, and how both get to disk and back."""

    def __init__(self, task: Task, recipe: Recipe, folder: Path) -> None:
        self.task, self.recipe, self.folder = task, recipe, folder
        self.checkpoint = folder / CHECKPOINT
        self.steps = recipe.total_steps(len(task.examples))
        self.done = self.saved = 0
        self.updating = False
        """Parameters may have been changed by a step that is not counted as done yet."""
        self.history: list[Step] = []
        settings = recipe.model_dump(mode="json", exclude={"checkpoint_every"})
        self.settings = {**settings, "examples": len(task.examples)}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": list(group.parameters.values()),
                    "weight_decay": recipe.weight_decay if group.weight_decay is None else group.weight_decay,
                }
                for group in task.groups
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
        )

    def begin_log(self) -> None:
        """Write the log anew, without lines of steps that were lost."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{json.dumps(asdict(step))}\n" for step in self.history)
            (self.folder / LOG).write_text(lines, encoding="utf-8")
        except OSError as error:
            raise RunFailed(f"the training cannot be logged in {self.folder}: {_reason(error)}") from error

    def log(self, step: Step) -> None:
        """Add a step to history and log."""
        self.history.append(step)
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                print(json.dumps(asdict(step)), file=file)
        except OSError as error:
            raise RunFailed(f"the training cannot be logged in {self.folder}: {_reason(error)}") from error

    def save(self) -> None:
        """Replace the checkpoint by one of the present step."""
        tensors = {f"parameter/{name}": value.detach() for name, value in self.task.parameters().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
        part = self.checkpoint.with_suffix(".part")
        metadata = {"step": str(self.done), "settings": json.dumps(self.settings)}
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata)
            part.replace(self.checkpoint)
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"the checkpoint of step {self.done} could not be written to {self.folder} (the last one: step "
                f"{self.saved}): {error}"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        self.saved = self.done

    def restore(self) -> None:
        """Go to the step of the checkpoint, when there is one."""
        if not self.checkpoint.exists():
            return
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            self._check_settings(json.loads(metadata["settings"]))
            for name, parameter in self.task.parameters().items():
                parameter.data.copy_(tensors[f"parameter/{name}"])
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                kind, _, rest = name.partition("/")
                if kind == "optimizer":
                    index, _, moment = rest.partition("/")
                    moments.setdefault(int(index), {})[moment] = value
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.done = self.saved = int(metadata["step"])
            lines = (self.folder / LOG).read_text(encoding="utf-8").splitlines()[: self.done]
            self.history = [Step(**json.loads(line)) for line in lines]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"{self.folder} does not hold a checkpoint of this training ({error}); train into a new folder"
            ) from error

    def _check_settings(self, saved: dict[str, Any]) -> None:
        for name in sorted(saved.keys() | self.settings.keys()):
            if saved.get(name) != self.settings.get(name):
                raise BadInput(
                    f"{self.folder} holds a training with {name} = {saved.get(name)}, not "
                    f"{self.settings.get(name)}: resume it with the same settings, or train into a new folder"
                )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
