"""Hyper-parameters of an implementation as rows of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taxonomy import queries

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Parameter(queries.Parameter):
    """A hyper-parameter with the JSON ``schema`` of its field, of which ``type`` is the readable form."""

    schema: Mapping[str, Any]


def parameters_of(cls: type[BaseModel]) -> tuple[Parameter, ...]:
    """The fields of a pydantic model as rows of the catalogue, in their order."""
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
    from pydantic_core import core_schema

    class Lenient(GenerateJsonSchema):
        """A field that has no JSON schema (a tensor, a callable) is shown without one."""

        def emit_warning(self, kind: Any, detail: str) -> None:
            """A default that JSON cannot hold is left out; that needs no warning."""

        def handle_invalid_for_json_schema(
            self, schema: core_schema.CoreSchema, error_info: str
        ) -> JsonSchemaValue:
            return {}

    document = cls.model_json_schema(schema_generator=Lenient)
    definitions = document.get("$defs", {})
    rows = []
    for name, field in cls.model_fields.items():
        shape = document.get("properties", {}).get(field.alias or name, {})
        kept = {key: value for key, value in shape.items() if key not in ("title", "description", "default")}
        rows.append(
            Parameter(
                name=name,
                type=_readable(shape, definitions),
                default=shape.get("default"),
                required=field.is_required(),
                description=" ".join((field.description or "").split()),
                schema=kept,
            )
        )
    return tuple(rows)


_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _readable(shape: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema in a few words: ``number > 0, <= 1``, ``greedy | sample``, ``list of integer``."""
    if "$ref" in shape:
        name = str(shape["$ref"]).rpartition("/")[2]
        target = definitions.get(name, {})
        return _readable(target, definitions) if "enum" in target else name
    if "enum" in shape:
        return " | ".join(str(value) for value in shape["enum"])
    if "const" in shape:
        return str(shape["const"])
    for key in ("anyOf", "oneOf"):
        if key in shape:
            return " | ".join(dict.fromkeys(_readable(option, definitions) for option in shape[key]))
    kind = {"null": "none", "string": "text", "boolean": "yes or no"}.get(
        shape.get("type", ""), shape.get("type", "any")
    )
    if kind == "array":
        return f"list of {_readable(shape.get('items', {}), definitions)}"
    bounds = [f"{sign} {shape[key]:g}" for key, sign in _BOUNDS.items() if key in shape]
    return f"{kind} {', '.join(bounds)}" if bounds else str(kind)
