"""Columns that hold JSON: facets and properties of a card."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from taxonomy.vocabulary import FACETS, PROPERTIES


class _StoredJson(Mapping[str, Any]):
    """A JSON object that is parsed when somebody looks into it: most rows of a long list are only counted or named."""

    __slots__ = ("_parsed", "_text")

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def _values(self) -> dict[str, Any]:
        try:
            return self._parsed
        except AttributeError:
            self._parsed: dict[str, Any] = self._in_order(json.loads(self._text))
            return self._parsed

    @staticmethod
    @abstractmethod
    def _in_order(values: dict[str, Any]) -> dict[str, Any]:
        """The values with their keys in the order in which people read them."""

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


class StoredFacets(_StoredJson):
    """Terms by facet, in the order of the vocabulary."""

    __slots__ = ()

    @staticmethod
    def _in_order(values: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(values[name]) for name in FACETS if name in values}


class StoredProperties(_StoredJson):
    """Yes or no by property, in the order of the vocabulary."""

    __slots__ = ()

    @staticmethod
    def _in_order(values: dict[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in PROPERTIES if name in values}
