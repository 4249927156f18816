"""How reading commands print: tables that fit the terminal, plain tab-separated text when piped, JSON when asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from taxonomy.queries import as_json, complete, open_catalog

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

YES, NO = "✓", "·"


class Column(NamedTuple):
    """A column of a table. ``wide``: on narrower terminals it is left out; in a pipe and in JSON it never is."""

    title: str
    style: str = ""
    justify: Any = "left"
    wide: int = 0


def terminal() -> Console:
    """Standard output. Rich honours NO_COLOR, COLUMNS and dumb terminals; a pipe has no right edge."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000
    return console


def print_json(value: Any) -> None:
    """Print dataclasses, lists and dictionaries as JSON."""
    sys.stdout.write(json.dumps(as_json(value), ensure_ascii=False, indent=2) + "\n")


def print_table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    foot: str = "",
    console: Console | None = None,
) -> None:
    """Print rows as a table on a terminal, else as tab-separated lines with a header, nothing cut."""
    console = console or terminal()
    if not console.is_terminal:
        for cells in ([column.title for column in columns], *rows):
            console.file.write("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
        return
    chosen = [place for place, column in enumerate(columns) if console.width >= column.wide]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    widths = _widths(
        [[columns[place].title, *(row[place] for row in rows)] for place in chosen], console.width
    )
    for place, width in zip(chosen, widths, strict=True):
        column = columns[place]
        table.add_column(
            Text(column.title), style=column.style, justify=column.justify, width=width, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(row[place]) for place in chosen))
    console.print(table)
    if foot:
        console.print(Text(foot, style="dim"))


def _widths(texts: Sequence[Sequence[str]], available: int, gap: int = 2) -> list[int]:
    """Width of each column so that all fit: first its longest word, then more for those with long texts.

    Every column gets its longest word while that is possible at all, so that no word is cut; what is left goes to
    the columns that wrap, a cell at a time to the one whose text would take most lines.
    """
    available -= gap * len(texts)
    full = [max((len(line) for text in column for line in text.splitlines()), default=1) for column in texts]
    least = [max((len(word) for text in column for word in text.split()), default=1) for column in texts]
    widths = [min(pair) for pair in zip(full, least, strict=True)]
    while sum(widths) < available:
        wanting = [place for place in range(len(full)) if widths[place] < full[place]]
        if not wanting:
            break
        widths[max(wanting, key=lambda place: full[place] / widths[place])] += 1
    while sum(widths) > available and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return [max(1, width) for width in widths]


def print_parts(parts: Iterable[RenderableType], console: Console, width: int) -> None:
    """Print a page; in a pipe without the blanks that fill each line to ``width``."""
    if console.is_terminal:
        for part in parts:
            console.print(part, width=width)
        return
    with console.capture() as page:
        for part in parts:
            console.print(part, width=width)
    console.file.write("".join(f"{line.rstrip()}\n" for line in page.get().splitlines()))


def counted(number: int, noun: str) -> str:
    """``1 method``, ``2 methods``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Shell completion of method names; silent when there is no catalogue."""
    from taxonomy.errors import TaxonomyError

    try:
        return complete(open_catalog(), incomplete)
    except TaxonomyError:
        return []
