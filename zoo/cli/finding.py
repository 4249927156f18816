"""``zoo find``: every facet and every property of the vocabulary is an option."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from taxonomy import queries
from taxonomy.vocabulary import FACETS, PROPERTIES
from zoo.cli.output import Json, print_json
from zoo.cli.reading import Kind, kinds_of, print_methods


def find(**options: Any) -> None:
    """Find methods that meet all conditions.

    Every facet is an option: --where before-llm; a comma means "or", a repeated option "and"; --not-where excludes.
    A term takes in the terms below it. Every property is a yes/no option: --no-needs-attention-maps finds cards that
    state it as absent. `zoo taxonomy terms` explains the terms.
    """
    year = options.pop("year")
    as_json = options.pop("json")
    methods = queries.find(
        queries.open_catalog(),
        include={name: [_split(group) for group in options[name] or ()] for name in FACETS},
        exclude={
            name: [term for group in options[f"not_{name}"] or () for term in _split(group)]
            for name in FACETS
        },
        properties={name: options[name] for name in PROPERTIES if options[name] is not None},
        implemented=options["implemented"],
        years=queries.parse_years(year) if year else None,
        name=options["name"],
        kinds=kinds_of(options["kind"]),
    )
    print_json(methods) if as_json else print_methods(methods)


def _split(group: str) -> list[str]:
    return [term for term in (part.strip() for part in group.split(",")) if term]


def _completer(facet: str) -> Any:
    def complete(incomplete: str) -> list[tuple[str, str]]:
        *before, last = incomplete.split(",")
        return [
            (",".join([*before, term.id]), term.definition)
            for term in FACETS[facet].terms
            if term.id.startswith(last)
        ]

    return complete


def _options() -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of every option, from the vocabulary."""
    options: dict[str, tuple[Any, Any]] = {}
    for name, facet in FACETS.items():
        flag = name.replace("_", "-")
        shared: dict[str, Any] = {"metavar": "TERM", "autocompletion": _completer(name)}
        survey = "" if facet.view == "core" else f" ({facet.view})"
        ask = typer.Option(f"--{flag}", help=f"{facet.question.partition(' (')[0]}{survey}", **shared)
        refuse = typer.Option(
            f"--not-{flag}", help=f"Without this {facet.label.lower()}.", hidden=True, **shared
        )
        options[name] = (Annotated[list[str] | None, ask], None)
        options[f"not_{name}"] = (Annotated[list[str] | None, refuse], None)
    for name, prop in PROPERTIES.items():
        flag = name.replace("_", "-")
        options[name] = (
            Annotated[bool | None, typer.Option(f"--{flag}/--no-{flag}", help=prop.statement)],
            None,
        )
    runs = typer.Option("--implemented/--no-implemented", help="Runs here, or only has a card.")
    years = typer.Option("--year", help="2024, 2023..2025, 2024.. or ..2022.")
    options["implemented"] = (Annotated[bool | None, runs], None)
    options["year"] = (Annotated[str | None, years], None)
    options["name"] = (Annotated[str | None, typer.Option("--name", help="Part of the name.")], None)
    options["kind"] = (Kind, None)
    options["json"] = (Json, False)
    return options


def _give_signature() -> None:
    """Typer reads a command's options from its signature; this one follows the vocabulary."""
    options = _options()
    find.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}
    vars(find)["__signature__"] = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
    )


_give_signature()
