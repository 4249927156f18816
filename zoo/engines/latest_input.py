"""What an engine recorded about the latest input."""

from __future__ import annotations

from typing import Generic, TypeVar

from zoo.errors import BadInput

Record = TypeVar("Record")


class RecordsLatest(Generic[Record]):
    """Mixin of engines that keep a record of the latest input that ran to its end.

    Attributes:
        name: who is at work, for messages.
    """

    name: str
    _latest: Record | None = None

    @property
    def _finished(self) -> Record:
        """The record; raises ``BadInput`` when no input has run yet."""
        if self._latest is None:
            raise BadInput(f"{self.name} has nothing to report: no input has run yet")
        return self._latest
