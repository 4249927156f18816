"""A finished run beside the unmodified model, with its scores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from taxonomy.scores import Score

BUDGETS = ("sparsity", "keep_ratio")
"""Parameters that set how much leaves: told even at their default, since every method of a family has another one."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished run with its scores by quantity.

    ``settings`` are the parameters that set the budget and those that are not at their default. ``trial`` is the same
    for cells of a plan that differ in their task only. ``members`` are the runs that it stands for, where each measured
    another task or was another one of ``draws`` (``taxonomy.evidence.pooling``).
    """

    key: str
    origin: str
    method: str
    model: str
    hardware: str
    environment: str
    device: str | None
    dtype: str | None
    protocol: str
    started: str
    config: str
    settings: Mapping[str, Any]
    scores: Mapping[str, Score] = field(default_factory=dict)
    trial: str | None = None
    members: tuple[Trial, ...] = ()
    draws: int = 1

    @property
    def runs(self) -> tuple[Trial, ...]:
        """The runs it stands for, itself where it is one."""
        return self.members or (self,)

    @property
    def setting_text(self) -> str:
        """The settings in one line, as ``sparsity=0.3``."""
        words = [f"{name}={_plain(value)}" for name, value in self.settings.items()]
        return ", ".join([*words, f"mean of {self.draws} seeds"] if self.draws > 1 else words)

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return command_of(self.method, self.model, self.settings)


def command_of(method: str, model: str, settings: Mapping[str, Any]) -> str:
    """The command that runs ``method`` on ``model`` with these settings."""
    words = ["zoo", "run", method, "--model", model]
    for name, value in settings.items():
        words += ["--set", f"{name}={_plain(value)}"]
    return shlex.join(words)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
