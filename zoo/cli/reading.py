"""``zoo list | search | show | compare | papers``: read the catalogue, in a blink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from taxonomy import queries
from taxonomy.queries import MethodRow, labels, open_catalog, parse_years
from taxonomy.vocabulary import FACETS
from zoo.cli.output import NO, YES, Column, Json, complete_method, counted, print_json, print_table

METHOD_COLUMNS = (
    Column("method", "bold cyan"),
    Column("year", "", "right"),
    Column("family"),
    Column("runs", "green", "center"),
    Column("where", "", "left", 100),
    Column("training", "", "left", 100),
    Column("signal", "", "left", 140),
    Column("operation", "", "left", 180),
)

Names = Annotated[
    list[str],
    typer.Argument(help="Two or more methods.", metavar="METHOD...", autocompletion=complete_method),
]
Kind = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        help=f"Kind of card: {', '.join(queries.KINDS)}, or all. Default: {', '.join(queries.ACTING)}.",
    ),
]


def kinds_of(chosen: Sequence[str] | None) -> Sequence[str]:
    """Kinds of card that ``--kind`` asks for."""
    if not chosen:
        return queries.ACTING
    return queries.KINDS if "all" in chosen else chosen


def print_methods(methods: Sequence[MethodRow], foot: str = "") -> None:
    """A table of methods."""
    rows = []
    for method in methods:
        facets = [
            ", ".join(labels(FACETS[name], method.facets.get(name, ())))
            for name in ("where", "training", "signal", "operation")
        ]
        family = FACETS["family"][method.family].label
        rows.append((method.slug, str(method.year), family, YES if method.implemented else NO, *facets))
    run = sum(method.implemented for method in methods)
    print_table(METHOD_COLUMNS, rows, foot=foot or f"{counted(len(methods), 'card')}, {run} of them run here")


def list_(
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    implemented: Annotated[
        bool | None,
        typer.Option("--implemented/--no-implemented", help="Only what runs here, or only what does not."),
    ] = None,
    kind: Kind = None,
    json: Json = False,
) -> None:
    """List the methods: those that run here and those that only have a card.

    `zoo find` takes any facet or property as a condition.
    """
    methods = queries.list_methods(
        open_catalog(), family=family, implemented=implemented, kinds=kinds_of(kind)
    )
    print_json(methods) if json else print_methods(methods)


def search(
    words: Annotated[
        list[str], typer.Argument(help='Words that must all occur; "..." keeps a phrase together.')
    ],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 20,
    json: Json = False,
) -> None:
    """Search names, titles, summaries, terms and notes of all cards; best match first."""
    methods = queries.search(open_catalog(), " ".join(words), limit)
    if json:
        print_json(methods)
    elif methods:
        print_methods(methods)
    else:
        typer.echo(f"No card mentions {' '.join(words)!r}; `zoo papers` searches the bibliography.", err=True)


def show(
    method: Annotated[str, typer.Argument(help="Name of the method.", autocompletion=complete_method)],
    json: Json = False,
) -> None:
    """Show one method: what it does, parameters, what its paper reports, what was verified here, what is like it."""
    page = queries.show(open_catalog(), method)
    if json:
        print_json(page)
        return
    from zoo.cli.method_card import print_card

    print_card(page)


def compare(methods: Names, json: Json = False) -> None:
    """Put methods side by side; where they differ is in bold."""
    comparison = queries.compare(open_catalog(), methods)
    if json:
        print_json(comparison)
        return
    from zoo.cli.method_card import print_comparison

    print_comparison(comparison)


def papers(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words that must all occur in title, venue or topics.")
    ] = None,
    topic: Annotated[
        str | None, typer.Option("--topic", help="Only this topic (--topics lists them).")
    ] = None,
    year: Annotated[str | None, typer.Option("--year", help="2024, 2023..2025, 2024.. or ..2022.")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Only papers that this list (owner/name) carries.")
    ] = None,
    code: Annotated[
        bool | None, typer.Option("--code/--no-code", help="With, or without, a link to code.")
    ] = None,
    card: Annotated[bool | None, typer.Option("--card/--no-card", help="With, or without, a card.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 25,
    topics: Annotated[bool, typer.Option("--topics", help="List the topics instead.")] = False,
    json: Json = False,
) -> None:
    """Search the bibliography: best match first, or newest first without words."""
    catalog = open_catalog()
    if topics:
        gaps = queries.topics(catalog)
        columns = (
            Column("topic", "bold cyan"),
            *(Column(name, "", "right") for name in ("papers", "cards", "running")),
        )
        rows = [(gap.topic, str(gap.papers), str(gap.cards), str(gap.implemented)) for gap in gaps]
        print_json(gaps) if json else print_table(columns, rows, foot=counted(len(gaps), "topic"))
        return
    found = queries.papers(
        catalog,
        " ".join(words) if words else None,
        topic=topic,
        years=parse_years(year) if year else None,
        source=source,
        code=code,
        carded=card,
        limit=limit,
    )
    if json:
        print_json(found)
        return
    columns = (
        Column("title", "bold"),
        Column("year", "", "right"),
        Column("link", "cyan"),
        Column("card", "green"),
        Column("venue", "", "left", 110),
        Column("topics", "dim", "left", 150),
        Column("url", "", "left", 240),
        Column("code", "", "left", 240),
    )
    table = [
        (
            paper.title,
            str(paper.year or ""),
            f"arXiv:{paper.arxiv}" if paper.arxiv else _host(paper.url or ""),
            ", ".join(paper.cards),
            paper.venue or "",
            ", ".join(paper.topics),
            paper.url or (f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""),
            paper.code or "",
        )
        for paper in found
    ]
    more = " (--limit shows more)" if len(found) == limit else ""
    print_table(columns, table, foot=f"{counted(len(found), 'paper')}{more}")


def _host(url: str) -> str:
    """``aclanthology.org`` of a long address."""
    return url.partition("://")[2].partition("/")[0].removeprefix("www.")
