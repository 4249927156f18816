"""Tasks: what a method and the unmodified model are asked, side by side. And the registry that finds them by name.

A task is a frozen pydantic model whose fields are its options, as a method's are its parameters::

    @task("recognition")
    class Recognition(Task):
        \"\"\"What is where?\"\"\"

        limit: int = Field(200, ge=1, description="Questions that are asked.")

        def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
            ...

``dense`` and ``method`` are the two sides (``zoo.bench.session.Arm``). A reversible method is at work only inside
``with method.ready() as applied``, so both sides may share one model: never ask one while the other is ready. What
comes back is one ``zoo.bench.record.Comparison`` per quantity; ``zoo.bench.scoring`` makes figures of right and wrong
answers.

Every module of this package is imported to find its tasks, for plans that are only checked too: import torch inside
functions.
"""

from __future__ import annotations

import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Hashable
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from zoo.errors import BadInput, BadParameter

if TYPE_CHECKING:
    from zoo.bench.record import Comparison
    from zoo.bench.session import Arm, Progress

T = TypeVar("T")


class Kept:
    """What one model's next run can use again, such as its own answers: of every kind the latest value."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Hashable, Any]] = {}

    def once(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``kind`` that was made for an equal ``key``; else a new one, in place of the old."""
        found = self._values.get(kind)
        if found is None or found[0] != key:
            found = None
            self._values.pop(kind, None)  # the old value leaves memory before the new one is made
            found = self._values[kind] = (key, make())
        value: T = found[1]
        return value


class Desk:
    """What a task works with besides the two sides.

    Attributes:
        seed: of everything random.
        progress: called with what is done, finished and total steps.
        kept: the dense model's answers, which do not change from method to method (``answers``).
    """

    def __init__(self, seed: int = 0, progress: Progress | None = None, kept: Kept | None = None) -> None:
        self.seed = seed
        self.progress: Progress = progress or (lambda *_: None)
        self.kept = kept or Kept()

    def answers(self, task: Task, make: Callable[[], T]) -> T:
        """The dense model's answers to ``task``: ``make()`` the first time, then the same again.

        Use it for the dense side only, and for answers that depend on the task's options and the seed alone.
        """
        return self.kept.once(f"answers to {task.name}", (task.model_dump_json(), self.seed), make)


class Task(BaseModel):
    """Base of all tasks. The first line of a task's docstring is what ``zoo bench --tasks`` shows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str] = ""

    @abstractmethod
    def run(self, dense: Arm, method: Arm | None, desk: Desk) -> list[Comparison]:
        """Ask both sides.

        Args:
            dense: the unmodified model.
            method: the model with the method; ``None`` for the unmodified model alone.
            desk: seed, progress, and what was answered before.

        Returns:
            One comparison per quantity (of ``zoo.bench.record.QUANTITIES``), whose ``task`` names data and protocol.

        Raises:
            BadInput: the model cannot be asked this (no tokenizer, no place for pictures ...).
        """


_registered: dict[str, type[Task]] = {}
C = TypeVar("C", bound=type[Task])


def task(name: str) -> Callable[[C], C]:
    """Class decorator: make a task available under ``name``. A name that is taken is an error."""

    def decorate(cls: C) -> C:
        taken = _registered.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two tasks are called '{name}': {taken.__module__} and {cls.__module__}")
        cls.name = name
        _registered[name] = cls
        return cls

    return decorate


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def tasks() -> dict[str, type[Task]]:
    """All tasks by name, sorted."""
    _import_all()
    return dict(sorted(_registered.items()))


def make_task(name: str, **options: Any) -> Task:
    """A task by name.

    Raises:
        BadInput: there is no such task; the message has the nearest names.
        BadParameter: an option is unknown or out of range.
    """
    known = tasks()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise BadInput(f"there is no task called '{name}'; {hint}")
    try:
        return known[name](**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise BadParameter(
                f"the task {name} has no option '{option}'; it takes {', '.join(known[name].model_fields) or 'none'}"
            ) from None
        raise BadParameter(f"the task {name}: {option}: {first['msg']} (given: {first['input']!r})") from None
