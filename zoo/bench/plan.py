"""Plans: a TOML file that says which methods are measured on which models, at which budgets, on which tasks.

::

    name = "weights-mini"
    models = ["smollm2-135m"]
    tasks = ["side-by-side", { name = "perplexity", length = 1024 }]
    budgets = [0.1, 0.3, 0.5]
    seeds = [0]
    methods = ["flap", "cfsp", { name = "laco", budget = "threshold", budgets = [0.9, 0.75] }]

    [settings]
    calibration_windows = 32
    timeout = 900

    [[exclude]]
    method = "cfsp"
    budget = 0.5

Every combination is a *cell*. ``exclude`` leaves out the cells that match all of what it names; ``include`` adds single
ones. ``side-by-side`` is what ``zoo run`` measures: speed with its bound, memory, quality. Nothing here imports torch,
but checking the methods' parameters imports their modules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from taxonomy.runs import digest
from zoo.bench.record import PROTOCOL
from zoo.bench.settings import Settings
from zoo.bench.tasks import Task, make_task
from zoo.errors import BadInput, BadParameter
from zoo.interface import method as make_method
from zoo.interface import method_class

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SIDE_BY_SIDE = "side-by-side"
"""The task that every family has: what ``zoo run`` measures."""

BUDGETS = ("sparsity", "keep_ratio")
"""Parameters that a plan's budgets are given to when it names none: the first of these that the method has."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CellSettings(_Frozen):
    """How each cell is measured; all of it counts when cells are compared, except the time-out."""

    repeats: int = Field(Settings.repeats, ge=1, description="Timed rounds per quantity.")
    seconds: float = Field(Settings.seconds, ge=0, description="No further round of a quantity after this.")
    new_tokens: int | None = Field(None, ge=1, description="Tokens to generate.")
    windows: int = Field(Settings.windows, ge=1, description="Held-out windows of side-by-side runs.")
    window: int = Field(Settings.window, ge=2, description="Tokens in each of them.")
    prompt: int = Field(Settings.prompt, ge=1, description="Tokens of the timed prefill.")
    text: str | None = Field(None, description="The prompt of side-by-side runs.")
    images: tuple[str, ...] = Field((), description="Pictures of side-by-side runs.")
    calibration: str | None = Field(None, description="Calibration text, as for zoo run --calibration.")
    calibration_windows: int = Field(32, ge=1, description="Windows of 128 tokens drawn from it.")
    device: str | None = None
    device_map: str | None = Field(
        None, description="accelerate's placement of a model too large for one device: auto, balanced ..."
    )
    dtype: str | None = None
    timeout: float | None = Field(None, gt=0, description="Seconds after which a cell is given up.")

    @property
    def measuring(self) -> Settings:
        """The part that ``zoo run`` knows as its settings."""
        return Settings(self.repeats, self.seconds, self.new_tokens, self.windows, self.window, self.prompt)


class TaskChoice(_Frozen):
    """A task by name, with options; a plain string in a plan."""

    model_config = ConfigDict(extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exists(self) -> TaskChoice:
        self.make()
        return self

    def make(self) -> Task | None:
        """The task; ``None`` for side-by-side runs."""
        if self.name != SIDE_BY_SIDE:
            return make_task(self.name, **self.options)
        if self.options:
            raise BadParameter(f"{SIDE_BY_SIDE} takes no options; [settings] says how much is measured")
        return None

    @property
    def options(self) -> dict[str, Any]:
        """Those that were given."""
        return dict(self.model_extra or {})

    @property
    def complete(self) -> dict[str, Any]:
        """Name and all options, defaults too: equal for tasks that ask the same."""
        made = self.make()
        return {"name": self.name, **(made.model_dump(mode="json") if made is not None else {})}


class MethodChoice(_Frozen):
    """A method or stack with its budgets; a plain string in a plan."""

    name: str
    set: dict[str, Any] = Field(default_factory=dict, description="Parameters, as with zoo run --set.")
    budget: str | None = Field(None, description="The parameter that takes the budget.")
    budgets: tuple[float, ...] | None = Field(None, description="In place of the plan's.")
    draft: str | None = Field(None, description="Draft model of decoders that need one.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exists(self) -> MethodChoice:
        first = {self.budget: self.budgets[0]} if self.budget and self.budgets else {}
        make_method(self.name, **self.set, **first)
        if self.budgets and self.parameter is None:
            raise BadInput(
                f'{self.name} has no {" or ".join(BUDGETS)}; name its parameter with budget = "..."'
            )
        return self

    @property
    def parameter(self) -> str | None:
        """The parameter that takes a budget, if there is one."""
        if self.budget is not None:
            return self.budget
        fields = [method_class(slug.strip()).model_fields for slug in self.name.split("+")]
        return next(
            (name for name in BUDGETS if any(name in own for own in fields) and name not in self.set), None
        )


class Match(_Frozen):
    """Cells that an ``exclude`` leaves out: those equal to everything it names."""

    method: str | None = None
    model: str | None = None
    budget: float | None = None
    task: str | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Match:
        if not self.model_fields_set:
            raise BadInput(
                "an empty exclude would leave out everything; name a method, model, budget, task or seed"
            )
        return self

    def fits(self, cell: Cell) -> bool:
        """Whether ``cell`` is one of them."""
        values = {
            "method": cell.method, "model": cell.model, "budget": cell.budget,
            "task": cell.task.name, "seed": cell.seed,
        }  # fmt: skip
        return all(values[name] == getattr(self, name) for name in self.model_fields_set)


class Inclusion(_Frozen):
    """One cell more."""

    method: MethodChoice
    model: str
    budget: float | None = None
    task: TaskChoice
    seed: int = 0


class Cell(_Frozen):
    """One method at one budget on one model, asked one task with one seed."""

    method: str
    parameters: dict[str, Any]
    budget: float | None
    model: str
    task: TaskChoice
    seed: int
    draft: str | None = None
    settings: CellSettings

    @cached_property
    def hash(self) -> str:
        """Digest of everything that is asked: equal cells give comparable figures, and are run once."""
        return digest([{**self._subject, "task": self.task.complete}, PROTOCOL])

    @cached_property
    def trial(self) -> str:
        """The same without the task: figures of cells that share it speak of one thing."""
        return digest([self._subject, PROTOCOL])

    @cached_property
    def _subject(self) -> dict[str, Any]:
        subject = self.model_dump(mode="json", exclude={"task", "budget"})
        subject["parameters"] = make_method(self.method, **self.parameters).parameters()
        del subject["settings"]["timeout"]
        return subject

    @property
    def group(self) -> str:
        """Cells of one group share a model and what a weight method made of it, so one process should run them."""
        return digest(
            [self.model, self.method, self.parameters, self.seed, self.settings.model_dump(mode="json")]
        )

    @property
    def label(self) -> str:
        """For people: ``flap sparsity=0.3, smollm2-135m, perplexity length=1024``."""
        words = [self.method, *(f"{name}={value}" for name, value in self.parameters.items())]
        task = [self.task.name, *(f"{name}={value}" for name, value in self.task.options.items())]
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{' '.join(words)}, {self.model}, {' '.join(task)}{seed}"


class Plan(_Frozen):
    """What a plan file says. Every sentence of ``BadInput`` names the place in the file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="Lower case; names the plan in results.")
    description: str = ""
    methods: tuple[MethodChoice, ...] = ()
    models: tuple[str, ...] = ()
    tasks: tuple[TaskChoice, ...] = (TaskChoice(name=SIDE_BY_SIDE),)
    budgets: tuple[float, ...] = Field((), description="For the methods that have one; the others run once.")
    seeds: tuple[int, ...] = (0,)
    settings: CellSettings = CellSettings()
    include: tuple[Inclusion, ...] = ()
    exclude: tuple[Match, ...] = ()

    @field_validator("models")
    @classmethod
    def _no_empty_name(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if not all(models):
            raise BadInput("a model needs a name: a short name, a folder or a hub id")
        return models

    def cells(self) -> list[Cell]:
        """All cells, those that share a model and a pruned model side by side; equal ones once.

        Raises:
            BadInput: a budget is out of a method's range, or there is no cell at all.
        """
        crossed = product(self.models, self.methods)
        found = [cell for model, choice in crossed for cell in self._of(model, choice)]
        kept = [cell for cell in found if not any(match.fits(cell) for match in self.exclude)]
        kept += [
            self._cell(more.model, more.method, more.budget, more.task, more.seed) for more in self.include
        ]
        if not kept:
            raise BadInput(f"the plan {self.name} has no cell; give it methods and models, or exclude less")
        return list({cell.hash: cell for cell in kept}.values())

    def _of(self, model: str, choice: MethodChoice) -> Iterator[Cell]:
        budgets: tuple[float | None, ...] = self.budgets if choice.budgets is None else choice.budgets
        if choice.parameter is None or not budgets:
            budgets = (None,)
        for budget, seed, task in product(budgets, self.seeds, self.tasks):
            yield self._cell(model, choice, budget, task, seed)

    def _cell(
        self, model: str, choice: MethodChoice, budget: float | None, task: TaskChoice, seed: int
    ) -> Cell:
        parameters = dict(choice.set)
        if budget is not None:
            if choice.parameter is None:
                raise BadInput(f"{choice.name} has no budget to set; leave {budget} out")
            parameters[choice.parameter] = budget
        make_method(choice.name, **parameters)  # a wrong budget is refused before anything runs
        return Cell(
            method=choice.name, parameters=parameters, budget=budget, model=model, task=task, seed=seed,
            draft=choice.draft, settings=self.settings,
        )  # fmt: skip


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan.

    Raises:
        BadInput: no such file, not TOML, or something in it is wrong: one sentence with the place.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise BadInput(f"the plan {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}") from None
    place: list[str] = []
    try:
        return _checked(values, place)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        given = f" (given: {first['input']!r})" if first["type"] not in ("missing", "extra_forbidden") else ""
        raise BadInput(f"{path}: {where or 'plan'}: {first['msg']}{given}") from None
    except BadInput as error:
        raise BadInput(f"{path}: {''.join(f'{part}: ' for part in place)}{error}") from None


def _checked(values: dict[str, Any], place: list[str]) -> Plan:
    """The plan. What a validator refuses with ``BadInput`` has no place of its own, so lists are checked one by one."""
    parts: dict[str, type[BaseModel]] = {
        "methods": MethodChoice, "tasks": TaskChoice, "include": Inclusion, "exclude": Match,
    }  # fmt: skip
    for name, part in parts.items():
        if isinstance(rows := values.get(name), list):
            for number, row in enumerate(rows):
                place[:] = [f"{name}.{number}"]
                try:
                    part.model_validate(row)
                except ValidationError:
                    break  # the check of the whole tells it, with its place
    place.clear()
    return Plan.model_validate(values)
