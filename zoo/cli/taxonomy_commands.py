"""``zoo taxonomy tree | matrix | terms | gaps``: the field as a whole."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.columns import Columns as ColumnLayout
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as DrawnTree

from taxonomy import queries
from taxonomy.queries import Cell, Node, open_catalog
from taxonomy.vocabulary import FACETS
from zoo.cli.output import NO, YES, Column, Json, counted, print_json, print_parts, print_table, terminal

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Trees, matrix, glossary and gaps of the field.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete_view(incomplete: str) -> list[str]:
    return [view for view in queries.views() if view.startswith(incomplete)]


def _complete_facet(incomplete: str) -> list[tuple[str, str]]:
    return [(name, facet.question) for name, facet in FACETS.items() if name.startswith(incomplete)]


Rows = Annotated[str, typer.Argument(help="Facet of the rows.", autocompletion=_complete_facet)]
Columns = Annotated[str, typer.Argument(help="Facet of the columns.", autocompletion=_complete_facet)]


@app.command()
def tree(
    view: Annotated[
        str,
        typer.Option(
            "--view",
            "--scheme",
            help=f"Whose tree: {', '.join(queries.views())} (its beginning is enough).",
            autocompletion=_complete_view,
        ),
    ] = "core",
    facet: Annotated[
        str | None, typer.Option("--facet", help="Only this facet.", autocompletion=_complete_facet)
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods/--no-methods", help="Name the methods of each term.")
    ] = True,
    json: Json = False,
) -> None:
    """Draw the terms as trees, with the methods that use them; those that run are marked."""
    catalog = open_catalog()
    trees = queries.tree(catalog, view, facet)
    if json:
        print_json(trees)
        return
    running = {row.slug for row in queries.list_methods(catalog, implemented=True, kinds=queries.KINDS)}
    console = terminal()
    drawings = []
    for branch in trees:
        drawn = DrawnTree(
            Text.assemble((branch.label, "bold cyan"), f"  {branch.question}"), guide_style="dim"
        )
        for node in branch.nodes:
            _grow(drawn, node, running, methods)
        drawings.append(drawn)
    print_parts(drawings, console, console.width)


def _grow(parent: DrawnTree, node: Node, running: set[str], methods: bool) -> None:
    used = "" if node.count else "dim"
    label = Text.assemble((node.label, f"bold {used}"), (f"  {node.count}", used))
    if node.implemented:
        label.append(f"  {YES}{node.implemented}", "green")
    branch = parent.add(label)
    for child in node.children:
        _grow(branch, child, running, methods)
    below = {slug for child in node.children for slug in child.methods}
    own = [slug for slug in node.methods if slug not in below]
    if methods and own:
        names = Text(", ").join(Text(slug, "green" if slug in running else "dim") for slug in own)
        branch.add(names)


@app.command()
def matrix(rows: Rows = "where", columns: Columns = "signal", json: Json = False) -> None:
    """Cross two facets: how many methods each combination has (and how many run)."""
    crossed = queries.matrix(open_catalog(), rows, columns)
    if json:
        print_json(crossed)
        return
    down, across = FACETS[crossed.rows], FACETS[crossed.columns]
    console = terminal()
    if not console.is_terminal:
        names = [Column(crossed.rows), *(Column(term) for term in crossed.column_terms)]
        print_table(
            names,
            [
                (row, *(_counts(crossed.cell(row, c)) for c in crossed.column_terms))
                for row in crossed.row_terms
            ],
        )
        return
    # Column titles are longer than counts: letters stand for them, and a legend follows.
    letters = {term: _letter(place) for place, term in enumerate(crossed.column_terms)}
    widest = max((len(down[row].label) for row in crossed.row_terms), default=0)
    at_once = max(1, (console.width - widest - 1) // 3)
    for start in range(0, len(crossed.column_terms), at_once):
        block = crossed.column_terms[start : start + at_once]
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column(down.label, style="cyan", no_wrap=True, width=widest)
        for term in block:
            table.add_column(letters[term], justify="right", no_wrap=True, width=2)
        for row in crossed.row_terms:
            table.add_row(down[row].label, *(_drawn(crossed.cell(row, term)) for term in block))
        console.print(table)
        console.print()
    console.print(Text(across.label, "bold"))
    legend = [f"{letter} {across[term].label}" for term, letter in letters.items()]
    console.print(ColumnLayout([Text(entry) for entry in legend], padding=(0, 2)))
    console.print(Text(f"{NO} no method yet; green: at least one of them runs here", "dim"))


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else "A" + chr(ord("A") + place - 26)


def _counts(cell: Cell) -> str:
    return f"{cell.count}/{cell.implemented}"


def _drawn(cell: Cell) -> Text:
    if not cell.count:
        return Text(NO, "dim")
    return Text(str(cell.count), "bold green" if cell.implemented else "")


@app.command()
def terms(
    facet: Annotated[
        str | None, typer.Argument(help="Only this facet.", autocompletion=_complete_facet)
    ] = None,
    json: Json = False,
) -> None:
    """The glossary: every term with its meaning and how many cards use it."""
    found = queries.terms(open_catalog(), facet)
    if json:
        print_json(found)
        return
    columns = (
        Column("facet", "dim"),
        Column("term", "bold cyan"),
        Column("cards", "", "right"),
        Column("meaning"),
    )
    rows = [(term.facet, term.id, str(term.count), f"{term.label}: {term.definition}") for term in found]
    print_table(columns, rows, foot=counted(len(found), "term"))


@app.command()
def gaps(
    rows: Rows = "where",
    columns: Columns = "signal",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many of each kind.")] = 10,
    json: Json = False,
) -> None:
    """What is missing: combinations that nobody runs, combinations nobody tried, topics without cards."""
    found = queries.gaps(open_catalog(), rows, columns)
    if json:
        print_json(found)
        return
    down, across = FACETS[found.rows], FACETS[found.columns]
    console = terminal()
    _title(f"With cards, none of which runs here ({down.label} × {across.label})")
    print_table(
        (
            Column(found.rows, "cyan"),
            Column(found.columns, "cyan"),
            Column("cards", "", "right"),
            Column("methods"),
        ),
        [
            (down[cell.row].label, across[cell.column].label, str(cell.count), ", ".join(cell.methods))
            for cell in found.unimplemented[:limit]
        ],
        console=console,
    )
    _title(f"Empty, although both sides are common: no method here combines them ({len(found.empty)} in all)")
    print_table(
        (
            Column(found.rows, "cyan"),
            Column(found.columns, "cyan"),
            Column("expected by chance", "", "right"),
        ),
        [
            (down[cell.row].label, across[cell.column].label, f"{cell.expected:.1f}")
            for cell in found.empty[:limit]
        ],
        console=console,
    )
    _title("Topics of the bibliography with most papers that have no card")
    print_table(
        (
            Column("topic", "cyan"),
            Column("papers", "", "right"),
            Column("cards", "", "right"),
            Column("run", "", "right"),
        ),
        [(row.topic, str(row.papers), str(row.cards), str(row.implemented)) for row in found.topics[:limit]],
        console=console,
    )


def _title(text: str) -> None:
    terminal().print(Text(f"\n{text}", "bold"))
